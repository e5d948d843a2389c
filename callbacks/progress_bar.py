"""One line that says where the run is."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from callbacks.journal import journal_of


class RunProgressBar(ProgressBar):
    """Steps done of all, loss, images per second and time left; plain lines every ``seconds`` where no terminal is."""

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._console = Console()
        self._bar: Progress | None = None
        self._spoke = 0.0
        self._begin = (0.0, 0)

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._console.quiet = True

    def enable(self) -> None:
        """Show again."""
        self._console.quiet = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step where the run stands."""
        self._begin = (time.perf_counter(), pl_module.progress.step)
        self._spoke = 0.0
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.add_task("train", total=trainer.max_steps, completed=pl_module.progress.step, numbers="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; numbers are the journal's last, so that the bar itself reads nothing from the device."""
        step = pl_module.progress.step
        journal = journal_of(trainer)
        latest = {} if journal is None else journal.latest
        numbers = f"loss {latest['train/loss']:.4f}" if "train/loss" in latest else ""
        if "throughput/images_per_second" in latest:
            numbers += f" | {latest['throughput/images_per_second']:.1f} images/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=numbers)
        elif time.perf_counter() - self._spoke > self.seconds or step == trainer.max_steps:
            self._spoke = time.perf_counter()
            begin, first = self._begin
            left = (self._spoke - begin) / max(step - first, 1) * (trainer.max_steps - step)
            # Plain print: rich would wrap the line to 80 columns where no terminal tells its width.
            if not self._console.quiet:
                print(f"step {step}/{trainer.max_steps} | {numbers} | {left:.0f} s left", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
