"""A network that never learns."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """A module that stays in evaluation mode whatever its owner does; call :meth:`freeze` once it is built.

    A frozen network in training mode would draw dropout and move batch statistics, and nothing would say so.
    """

    def freeze(self) -> None:
        """No gradient for any parameter, evaluation mode."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        """Evaluation mode, for either value of ``mode``."""
        return super().train(False)


def digest(module: nn.Module, *facts: object) -> str:
    """12 hexadecimal digits that change with any weight, any buffer of the state dict and any of the facts."""
    sha = hashlib.sha256(repr(facts).encode())
    for name, value in sorted(module.state_dict().items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        if not value.is_meta:  # on paper (task=plan) there is nothing to read
            sha.update(_bytes(value))
    return sha.hexdigest()[:12]


def _bytes(value: Tensor) -> memoryview:
    # Through bytes, because NumPy has no bfloat16.
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
