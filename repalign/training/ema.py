"""Exponential moving average of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA(nn.Module):
    """An averaged copy of some modules: ema <- decay ema + (1 - decay) live, for parameters and float buffers.

    Begins as a copy; integer buffers are copied as they are. With ``warmup`` the decay of update n is
    min(decay, (1 + n) / (10 + n)), so that short runs are not held back by their initial weights (TensorFlow's rule).
    The average is kept in float32 even where the live weights are not.

    It is an object of the core, not a trainer's hook, because losses may read it (a teacher), and it covers the trained
    parts alone: a frozen encoder is not copied. Updates are two fused calls, without a host synchronisation.
    """

    def __init__(
        self, live: nn.Module, decay: float = 0.9999, warmup: bool = False, fixed: Iterable[nn.Parameter] = ()
    ) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must be in [0, 1), found {decay}")
        self.decay = decay
        self.warmup = warmup
        shared = {id(parameter): parameter for parameter in fixed}
        self.module = copy.deepcopy(live, {**shared}).eval().requires_grad_(False)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if tensor.is_floating_point() and id(tensor) not in shared:
                tensor.data = tensor.data.float()

    def decay_at(self, update: int) -> float:
        """Decay of the n-th update, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, live: nn.Module, update: int) -> None:
        """Move the average towards the live weights; ``update`` counts from 0."""
        pairs = list(zip(_tensors(self.module), _tensors(live), strict=True))
        # Of sharded weights each process averages its own part: live and average are sharded alike.
        pairs = [(_local(a), _local(b)) for a, b in pairs if a is not b]
        averaged = [a for a, _ in pairs if a.is_floating_point()]
        current = [b.to(a.dtype) for a, b in pairs if a.is_floating_point()]
        torch._foreach_lerp_(averaged, current, 1 - self.decay_at(update))  # pyright: ignore[reportPrivateImportUsage]
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
