"""How long each phase of a round takes."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from repalign.errors import UserError

START = "start"


class PhaseTimes(pl.Callback):
    """Logs ``throughput/phase_seconds/<phase>``, seconds per round, for a method of several phases; at the end one line
    with all of them.

    Besides the phases (loss, backward pass, optimizer step): ``shared``, what they have in common before (REPA-E: the
    pass through the autoencoder and the frozen encoders), and ``average``, the EMA's update. On a GPU the moments are
    events in its queue, which are read every ``every`` rounds: no step waits for them. The first round, which compiles
    and allocates, is left out.

    Args:
        every: rounds between two logged means.

    Raises:
        UserError: from a hook, for a method without phases.
    """

    def __init__(self, every: int = 20) -> None:
        self.every = every
        self.totals: dict[str, float] = {}
        self.rounds = 0
        self._marks: list[tuple[str, Any]] = []
        self._window: dict[str, float] = {}
        self._first = self._since = self._seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask the module for its moments."""
        if not hasattr(pl_module, "phases"):
            raise UserError(
                f"callbacks.phase_times: {type(pl_module).__name__} trains in one phase; leave it out by "
                "~callbacks.phase_times"
            )
        on_gpu = pl_module.device.type == "cuda"

        def mark(name: str) -> None:
            moment: Any = torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter()
            if on_gpu:
                moment.record()
            self._marks.append((name, moment))

        pl_module.mark = mark
        self._seen = pl_module.progress.step
        self._first = self._since = self._seen + 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when it is due."""
        step = pl_module.progress.step
        if step == self._seen:
            return  # a micro-batch inside a round
        self._seen = step
        if step == self._first:
            self._marks.clear()
        elif step % self.every == 0 or step == trainer.max_steps:
            self._read()
            means = {
                f"throughput/phase_seconds/{name}": total / (step - self._since) for name, total in self._window.items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(means, step=step)
            self.rounds += step - self._since
            for name, total in self._window.items():
                self.totals[name] = self.totals.get(name, 0.0) + total
            self._since, self._window = step, {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All of it in one line."""
        if trainer.is_global_zero and self.rounds:
            shown = ", ".join(f"{name} {total / self.rounds:.3g}" for name, total in self.totals.items())
            whole = sum(self.totals.values()) / self.rounds
            print(f"seconds per round over {self.rounds}: {whole:.3g} = {shown}", flush=True)

    def _read(self) -> None:
        if self._marks and not isinstance(self._marks[-1][1], float):
            self._marks[-1][1].synchronize()
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if name == START:
                continue  # between two micro-batches: data, logging, previews
            seconds = after - before if isinstance(after, float) else before.elapsed_time(after) / 1000
            self._window[name] = self._window.get(name, 0.0) + seconds
        self._marks.clear()
