"""Whether a step's gradient may move the weights: decided on the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 0.05  # least deviation, as a share of the mean norm: a run whose norms hardly vary has no spike of 1 %


class GradientWatch:
    """Refuses gradients whose global norm is not finite or far above what it has been.

    A gradient is refused when its norm g is not finite, or when

        g > m + sigmas max(s, 0.05 m)

    with m and s^2 the moving mean and variance (decay 0.99) of the norms that were not refused, after ``warmup`` of
    them. A refused gradient changes nothing: neither weights nor the optimizer's moments, and buffers (running
    statistics) go back to where they were. The data go on, so the batch is passed over.

    Everything stays on the device: fused optimizers of PyTorch take a flag (``found_inf``). Any other optimizer costs
    one read per step. Of several processes all decide alike: they see the norm of the reduced gradient.

    Args:
        sigmas: deviations above the mean; None refuses what is not finite alone.
        warmup: norms before the first comparison.
        decay: of mean and variance.

    Attributes:
        refused: number of refused steps so far, or None before the first step.
        last: 1 when the last step was refused, else 0; on the device.
    """

    def __init__(self, sigmas: float | None = 10.0, warmup: int = 100, decay: float = 0.99) -> None:
        self.sigmas = float("inf") if sigmas is None else float(sigmas)
        self.warmup = warmup
        self.decay = decay
        self.refused: Tensor | None = None
        self.last: Tensor | None = None
        self._norms: dict[str, Tensor] = {}  # of each optimizer: count, mean, variance
        self._bad: Tensor | None = None  # of the step under way
        self._kept: list[Tensor] = []

    def begin(self, buffers: Iterable[Tensor]) -> None:
        """Remember buffers as they are before the first step."""
        self._kept = [buffer.clone() for buffer in buffers]

    def forget(self) -> None:
        """Losses have changed by plan (a phase joins): norms are compared with those from now on."""
        self._norms = {name: torch.zeros_like(norms) for name, norms in self._norms.items()}

    @torch.no_grad()
    def hold(self, optimizer: torch.optim.Optimizer, norm: Tensor, name: str = "") -> None:
        """Let the optimizer's next step pass when its gradient is refused.

        Args:
            optimizer: about to step.
            norm: global norm of its gradient, a scalar on the device.
            name: of the optimizer, where there are several.
        """
        norm = norm.detach().float().reshape(())
        kept = self._norms.get(name)
        if kept is None or kept.device != norm.device:
            kept = torch.zeros(3, device=norm.device) if kept is None else kept.to(norm.device)
        count, mean, variance = kept
        limit = mean + self.sigmas * torch.maximum(variance.sqrt(), FLOOR * mean)
        bad = ~norm.isfinite() | ((count >= self.warmup) & (norm > limit))
        # The mean of the first norms is their plain mean; the decay takes over as they grow many.
        share = torch.clamp(1 / (count + 1), min=1 - self.decay)
        away = norm - mean
        moved = torch.stack([count + 1, mean + share * away, (1 - share) * (variance + share * away * away)])
        self._norms[name] = torch.where(bad, kept, moved)
        flag = bad.float()
        self._bad = flag if self._bad is None else torch.maximum(self._bad, flag)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = flag  # pyright: ignore[reportAttributeAccessIssue]
        elif flag.item():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # optimizers pass over what has no gradient

    @torch.no_grad()
    def settle(self, buffers: Iterable[Tensor]) -> Tensor:
        """End a step: put buffers back if a gradient of it was refused; returns the number of refused steps so far."""
        assert self._bad is not None, "a step ends after its optimizers' steps"
        bad, self._bad = self._bad, None
        for kept, buffer in zip(self._kept, buffers, strict=True):
            buffer.copy_(torch.where(bad > 0, kept, buffer))
            kept.copy_(buffer)
        self.refused = bad if self.refused is None else self.refused.to(bad.device) + bad
        self.last = bad
        return self.refused

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike."""
        return {"norms": dict(self._norms), "refused": self.refused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._norms = dict(state["norms"])
        self.refused = state["refused"]


def moving_buffers(module: nn.Module, but: Iterable[str] = ()) -> list[Tensor]:
    """Buffers that training may move: all but those below the named children."""
    below = tuple(f"{name}." for name in but)
    return [buffer for name, buffer in module.named_buffers() if not name.startswith(below)]
