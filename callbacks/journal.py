"""Writes the numbers of training to every logger, and remembers the last ones for the progress bar."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from repalign.nn.precision import at_least_float32


class Journal(pl.Callback):
    """Every ``every`` finished steps: losses, gradient norm, learning rate and images per second, in one device read.

    Step numbers are the run's own (``pl_module.progress.step``), so a resumed run continues its curves.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.latest: dict[str, float] = {}
        self._since: tuple[float, int] | None = None
        self._written = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the throughput."""
        self._since = None
        self._written = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when the step is due."""
        step = pl_module.progress.step
        if step == self._written or not (step % self.every == 0 or step == trainer.max_steps or self._since is None):
            return
        self._written = step
        own = torch.stack([at_least_float32(value).reshape(()) for value in pl_module.finished_terms.values()])
        values = trainer.strategy.reduce(own, reduce_op="mean").tolist()  # over the ranks: of the whole global batch
        self.latest = dict(zip(pl_module.finished_terms, values, strict=True))
        self.latest["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        now = time.perf_counter()
        if self._since is not None:
            then, before = self._since
            self.latest["train/images_per_second"] = (step - before) * trainer.datamodule.batch_size / (now - then)
        if step % self.every == 0 or step == trainer.max_steps:
            for logger in trainer.loggers:
                logger.log_metrics(self.latest, step=step)
        self._since = (time.perf_counter(), step)

    def pause(self) -> None:
        """Leave what happens until the next step (previews, evaluation) out of the throughput."""
        self._since = None
