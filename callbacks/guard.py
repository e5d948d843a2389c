"""Stops or rolls back a training that has died without an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.checkpoint import checkpoints_in, step_of
from repalign.errors import UserError, unknown_choice

POLICIES = ("stop", "roll_back")
RULES = ("is not finite", "has been exactly 0", "has been out of bounds")


class Collapsed(UserError):
    """A training that goes on without learning.

    Attributes:
        step: at which it was noticed.
        since: first step of the fault.
        good: newest checkpoint from before the fault, or None.
        policy: 'stop' or 'roll_back'.
    """

    def __init__(self, message: str, step: int, since: int, good: Path | None, policy: str) -> None:
        super().__init__(message)
        self.step = step
        self.since = since
        self.good = good
        self.policy = policy


class Guard(pl.Callback):
    """Watches losses and gradient norms: not finite, exactly zero, or out of bounds for several steps in a row.

    A GAN whose loss is 0 for ever or a gradient norm of 0 raises no error anywhere: such runs have gone on for 90,000
    steps. The counts live on the device and are read every ``every`` steps, so no step waits for them.

    Args:
        nonzero: patterns of terms that may not be exactly zero for ``patience`` steps (``grad_norm*``, ``align/*``).
        bounds: pattern -> [lowest, highest] of terms that may not leave them for ``patience`` steps.
        patience: steps in a row. A value that is not finite counts at once.
        every: steps between two looks.
        policy: 'stop' ends the run with one line; 'roll_back' goes back to the newest checkpoint from before the fault
            and on from there with other noise (see :mod:`tasks.roll_back`).

    Raises:
        UserError: for another policy.
        Collapsed: from a hook, when a rule is broken.
    """

    def __init__(
        self,
        nonzero: Sequence[str] = ("grad_norm*",),
        bounds: Mapping[str, Sequence[float]] | None = None,
        patience: int = 100,
        every: int = 10,
        policy: str = "stop",
    ) -> None:
        if policy not in POLICIES:
            raise unknown_choice("callbacks.guard.policy", policy, POLICIES)
        self.nonzero = tuple(nonzero)
        self.bounds = {pattern: (float(low), float(high)) for pattern, (low, high) in (bounds or {}).items()}
        self.patience = patience
        self.every = every
        self.policy = policy
        self._names: tuple[str, ...] = ()
        self._seen = -1
        self._counts = self._limits = torch.zeros(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts begin anew."""
        self._names = ()
        self._seen = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count on the device; look when it is due."""
        step = pl_module.progress.step
        if step == self._seen:
            return  # a micro-batch inside a step
        self._seen = step
        terms = pl_module.finished_terms
        if tuple(terms) != self._names:  # at the first step, and when a phase joins
            self._begin(tuple(terms), next(iter(terms.values())).device)
        self._count(torch.stack([value.float().reshape(()) for value in terms.values()]))
        if step % self.every == 0 or step == trainer.max_steps:
            self._look(trainer, pl_module, step)

    def _begin(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        self._counts = torch.zeros(len(RULES), len(names), device=device)
        # A rule that does not concern a term is one that it cannot break.
        inside = {name: next((b for p, b in self.bounds.items() if _matches(name, p)), None) for name in names}
        self._limits = torch.tensor([inside[n] or (-torch.inf, torch.inf) for n in names], device=device).T
        self._zero_matters = torch.tensor([any(_matches(n, p) for p in self.nonzero) for n in names], device=device)

    def _count(self, values: Tensor) -> None:
        low, high = self._limits
        finite = values.isfinite()
        broken = torch.stack([~finite, (values == 0) & self._zero_matters, finite & ((values < low) | (values > high))])
        counts = self._counts + 1
        # What was not finite once stays so: a later look must not miss it.
        counts[1:] *= broken[1:]
        counts[0] = torch.where(broken[0] | (self._counts[0] > 0), counts[0], 0)
        self._counts = counts

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        counts = pl_module.all_gather(self._counts) if trainer.world_size > 1 else self._counts[None]
        assert isinstance(counts, Tensor)
        worst = counts.amax(0).tolist()  # over the ranks: they stop together
        broken = [
            (count, name, rule)
            for rule, row in zip(RULES, worst, strict=True)
            for name, count in zip(self._names, row, strict=True)
            if count >= (1 if rule == RULES[0] else self.patience)
        ]
        if broken:
            count, name, rule = max(broken)  # the one that began first
            raise self._collapse(pl_module.run_dir, step, name, rule, int(count))

    def _collapse(self, run_dir: Path, step: int, name: str, rule: str, count: int) -> Collapsed:
        since = step - count + 1
        before = [path for path in checkpoints_in(run_dir) if step_of(path) < since]
        good = before[-1] if before else None
        where = f"the newest checkpoint from before is '{good}'" if good else "there is no checkpoint from before"
        return Collapsed(
            f"callbacks.guard: step {step}: '{name}' {rule} since step {since}; {where}. Mend the cause (learning "
            "rate, precision, weights of the terms) and resume=CHECKPOINT, set callbacks.guard.policy=roll_back, or "
            "leave the guard out by ~callbacks.guard",
            step,
            since,
            good,
            self.policy,
        )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.removeprefix("train/"), pattern)
