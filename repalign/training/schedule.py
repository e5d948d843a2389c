"""Learning-rate schedules that PyTorch has no class for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from repalign.errors import unknown_choice


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
class WarmupFrom:
    """Factor start + (high - start) n / warmup while n < warmup, then what ``after`` says (LDM's schedulers).

    LDM's linear scheduler after the warm-up: low + (high - low) (1 - n / cycle); its cosine scheduler: low + (high -
    low) (1 + cos(pi x)) / 2 with x = (n - warmup) / (cycle - warmup), at most 1.

    Args:
        warmup: steps of the warm-up.
        start, high, low: factors at its beginning, at its end and at the end of the run.
        cycle: steps of the whole.
        decay: ``linear`` or ``cosine``.

    Raises:
        UserError: for another decay.
    """

    warmup: int
    start: float = 1e-6
    high: float = 1.0
    low: float = 1.0
    cycle: int = 10**13
    decay: str = "linear"

    def __post_init__(self) -> None:
        if self.decay not in ("linear", "cosine"):
            raise unknown_choice("scheduler.decay", self.decay, ("linear", "cosine"), "decay")

    def __call__(self, step: int) -> float:
        """Factor of the step that comes after ``step`` finished ones."""
        if step < self.warmup:
            return self.start + (self.high - self.start) * step / self.warmup
        if self.decay == "linear":
            return self.low + (self.high - self.low) * (1 - step / self.cycle)
        done = min((step - self.warmup) / (self.cycle - self.warmup), 1.0)
        return self.low + (self.high - self.low) * (1 + math.cos(math.pi * done)) / 2


def linear_warmup(optimizer: torch.optim.Optimizer, *, warmup: int, start: float = 1e-6) -> LambdaLR:
    """Linear warm-up from a fraction of each parameter group's learning rate, then constant (LDM-8 on churches).

    Args:
        optimizer: whose learning rates are scaled.
        warmup: steps of the warm-up.
        start: first learning rate as a fraction of the last.
    """
    return LambdaLR(optimizer, WarmupFrom(warmup, start))
