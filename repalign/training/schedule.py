"""Learning-rate schedules that PyTorch has no class for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class WarmupCosine:
    """Factor on the learning rate: (n + 1) / warmup while n < warmup, then half a cosine from 1 to ``floor``.

    With x = (n - warmup) / (steps - warmup): floor + (1 - floor) (1 + cos(pi x)) / 2 (Loshchilov & Hutter,
    arXiv:1608.03983, without restarts). A run no longer than the warm-up stays in it.
    """

    steps: int
    warmup: int
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """Factor of the step that comes after ``step`` finished ones."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


def warmup_cosine(optimizer: torch.optim.Optimizer, *, steps: int, warmup: int = 0, floor: float = 0.0) -> LambdaLR:
    """Linear warm-up, then cosine decay: :class:`WarmupCosine` on every parameter group's own learning rate.

    Args:
        optimizer: whose learning rates are scaled.
        steps: of the whole run.
        warmup: steps of the warm-up.
        floor: last learning rate as a fraction of the highest.
    """
    return LambdaLR(optimizer, WarmupCosine(steps, warmup, floor))


@dataclass
class Warmup:
    """Factor on the learning rate: (n + 1) / warmup while n < warmup, then 1."""

    warmup: int

    def __call__(self, step: int) -> float:
        """Factor of the step that comes after ``step`` finished ones."""
        return min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0


def linear_warmup(optimizer: torch.optim.Optimizer, *, warmup: int) -> LambdaLR:
    """Linear warm-up, then constant: :class:`Warmup` on every parameter group's own learning rate."""
    return LambdaLR(optimizer, Warmup(warmup))
