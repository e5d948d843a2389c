"""Writes the numbers of training to every logger, and remembers the last ones for the progress bar."""

from __future__ import annotations

import shutil
import time
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.work import Work
from repalign.nn.precision import at_least_float32
from repalign.performance.memory import peak_bytes

GIB = 2**30


class Journal(pl.Callback):
    """Every ``every`` finished steps: losses, gradient norm and learning rate (``train/``), speed and cost
    (``throughput/``), memory and disk (``system/``), in one device read. What the names mean: ``docs/dashboards.md``.

    Step numbers are the run's own (``pl_module.progress.step``), so a resumed run continues its curves; the cost is in
    the checkpoint and goes on, too.

    Args:
        every: steps between two rows.
        flops: see :class:`callbacks.work.Work`.
    """

    def __init__(self, every: int = 10, flops: str = "eager") -> None:
        self.every = every
        self.latest: dict[str, float] = {}
        self.work = Work(flops)
        self._since: tuple[float, int] | None = None
        self._written = self._seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the throughput."""
        self._since = None
        self._written = self._seen = pl_module.progress.step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The work of a batch begins."""
        self.work.begin(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write when the step is due."""
        step = pl_module.progress.step
        self.work.end(pl_module, trainer.world_size, step != self._seen)
        self._seen = step
        if step == self._written or not (step % self.every == 0 or step == trainer.max_steps or self._since is None):
            return
        self._written = step
        own = torch.stack([at_least_float32(value).reshape(()) for value in pl_module.finished_terms.values()])
        values = trainer.strategy.reduce(own, reduce_op="mean").tolist()  # over the ranks: of the whole global batch
        self.latest = dict(zip(pl_module.finished_terms, values, strict=True))
        self.latest["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        cost = self.work.numbers(step)
        now = time.perf_counter()
        if self._since is not None:
            then, before = self._since
            self.latest["throughput/images_per_second"] = (step - before) * trainer.datamodule.batch_size / (now - then)
        self.latest |= {f"throughput/{name}": value for name, value in cost.items()}
        if step % self.every == 0 or step == trainer.max_steps:
            self.latest["system/peak_memory_gib"] = peak_bytes(pl_module.device) / GIB
            self.latest["system/free_disk_gib"] = shutil.disk_usage(pl_module.run_dir).free / GIB
            for logger in trainer.loggers:
                logger.log_metrics(self.latest, step=step)
        self._since = (time.perf_counter(), step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave everything as it was."""
        self.work.stop_counting()

    def pause(self) -> None:
        """Leave what happens until the next step (previews, evaluation) out of throughput and cost."""
        self._since = None
        self.work.pause()

    def state_dict(self) -> dict[str, Any]:
        """The cost so far, for the checkpoint."""
        return self.work.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The cost so far, from a checkpoint."""
        self.work.load_state_dict(state_dict)


def journal_of(trainer: pl.Trainer) -> Journal | None:
    """The journal of a training, if it keeps one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Journal)), None)


def pause(trainer: pl.Trainer) -> None:
    """Tell the journal that what happens until the next step is no training."""
    journal = journal_of(trainer)
    if journal is not None:
        journal.pause()


def cost_of(trainer: pl.Trainer, step: int) -> dict[str, float]:
    """``eval/cost/...``: what the training behind a score has cost; written with the score, as one row."""
    journal = journal_of(trainer)
    return {} if journal is None else {f"eval/cost/{name}": value for name, value in journal.work.numbers(step).items()}
