"""Stops or rolls back a training that has died without an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from callbacks.checkpoint import checkpoints_in, step_of
from repalign.errors import UserError, unknown_choice
from repalign.training.watch import GradientWatch

POLICIES = ("stop", "roll_back")
RULES = ("is not finite", "has been exactly 0", "has been out of bounds")
GRADIENT = "gradient"  # counts as not finite when the watch refused it


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
    """Passes over single bad steps; ends or rolls back a run whose steps are bad in a row.

    A gradient that is not finite, or a spike, never reaches the weights (:mod:`repalign.training.watch`):
    that batch is passed over and counted (``train/skipped_steps``). ``row`` such steps in a row, or losses that are
    not finite, exactly zero or out of bounds for some time, end the run. A GAN whose loss is 0 for ever or a gradient
    norm of 0 raises no error anywhere: such runs have gone on for 90,000 steps. The counts live on the device and are
    read every ``every`` steps, so no step waits for them.

    With loss scaling (``precision=16-mixed``) the scaler passes over what is not finite, as part of its search for a
    scale; gradients are not watched then, the losses are.

    Args:
        sigmas: deviations above the mean norm that make a spike; null refuses what is not finite alone.
        row: bad steps in a row that end the run: refused gradients, and losses that are not finite.
        nonzero: patterns of terms that may not be exactly zero for ``patience`` steps (``grad_norm*``, ``align/*``).
        bounds: pattern -> [lowest, highest] of terms that may not leave them for ``patience`` steps.
        patience: steps in a row for those two.
        every: steps between two looks.
        policy: 'stop' ends the run with one line; 'roll_back' goes back to the newest checkpoint from before the fault
            and on from there with other noise (see :mod:`tasks.roll_back`).

    Raises:
        UserError: for another policy, or bounds of counts below 1.
        Collapsed: from a hook, when a rule is broken.
    """

    def __init__(
        self,
        nonzero: Sequence[str] = ("grad_norm*",),
        bounds: Mapping[str, Sequence[float]] | None = None,
        patience: int = 100,
        every: int = 10,
        policy: str = "stop",
        sigmas: float | None = 10.0,
        row: int = 3,
    ) -> None:
        if policy not in POLICIES:
            raise unknown_choice("callbacks.guard.policy", policy, POLICIES)
        for name, value in {"row": row, "every": every, "patience": patience}.items():
            if value < 1:
                raise UserError(f"callbacks.guard.{name}: expected 1 or more, found {value}")
        if sigmas is not None and sigmas <= 0:
            raise UserError(f"callbacks.guard.sigmas: expected more than 0, or null for no spikes, found {sigmas}")
        self.nonzero = tuple(nonzero)
        self.bounds = {pattern: (float(low), float(high)) for pattern, (low, high) in (bounds or {}).items()}
        self.patience = patience
        self.every = every
        self.policy = policy
        self.sigmas = sigmas
        self.row = row
        self._names: tuple[str, ...] = ()
        self._seen = -1
        self._skipped = 0
        self._counts = self._limits = torch.zeros(0)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The module asks the watch before each optimizer step; a checkpoint restores what it has seen."""
        precision = trainer.precision_plugin
        if not (isinstance(precision, MixedPrecision) and precision.scaler is not None):
            pl_module.watch = GradientWatch(self.sigmas)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts begin anew."""
        self._names = ()
        self._seen = pl_module.progress.step
        if pl_module.watch is not None:
            pl_module.watch.begin(pl_module.moving_buffers())
            refused = pl_module.watch.refused
            self._skipped = 0 if refused is None else int(refused)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count on the device; look when it is due."""
        step = pl_module.progress.step
        if step == self._seen:
            return  # a micro-batch inside a step
        self._seen = step
        terms = dict(pl_module.finished_terms)
        watch = pl_module.watch
        if watch is not None and watch.last is not None:
            terms[GRADIENT] = torch.where(watch.last > 0, torch.nan, 1.0)
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
        # What was not finite for a whole row stays so: a later look must not miss it.
        broken[0] |= self._counts[0] >= self.row
        self._counts = (self._counts + 1) * broken

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        watch = pl_module.watch
        refused = self._counts.new_zeros(1) if watch is None or watch.refused is None else watch.refused.reshape(1)
        own = torch.cat([self._counts.flatten(), refused])
        counts = pl_module.all_gather(own) if trainer.world_size > 1 else own[None]
        assert isinstance(counts, Tensor)
        *worst, skipped = counts.amax(0).tolist()  # over the ranks: they stop together; one read
        self._say(trainer, step, int(skipped))
        keys = [(rule, name) for rule in RULES for name in self._names]
        broken = [
            (count, name, rule)
            for (rule, name), count in zip(keys, worst, strict=True)
            if count >= (self.row if rule == RULES[0] else self.patience)
        ]
        if broken:
            count, name, rule = max(broken)  # the one that began first
            raise self._collapse(pl_module.run_dir, step, name, rule, int(count))

    def _say(self, trainer: pl.Trainer, step: int, skipped: int) -> None:
        if skipped > self._skipped and trainer.is_global_zero:
            print(
                f"callbacks.guard: step {step}: {skipped - self._skipped} of the last {self.every} gradients refused "
                f"(not finite, or a spike): the weights did not move; {skipped} so far",
                flush=True,
            )
        self._skipped = skipped

    def _collapse(self, run_dir: Path, step: int, name: str, rule: str, count: int) -> Collapsed:
        since = step - count + 1
        before = [path for path in checkpoints_in(run_dir) if step_of(path) < since]
        good = before[-1] if before else None
        if name == GRADIENT:
            rule = "has been refused (not finite, or a spike)"
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
