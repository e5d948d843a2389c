"""Another code's training step after each of ours, on the same batch, so that both meet the same machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from callbacks.step_times import StepTimes
from repalign.performance.stopwatch import Stopwatch

PEER = "peer"


class PeerSteps(pl.Callback):
    """Takes the other step when ours has ended; the time of either does not count as the other's.

    Args:
        times: of our steps, which stands before this callback.
        take: the other step of a batch; it divides its time among the regions of the stopwatch.

    Attributes:
        seconds: of each counted step of the other code by region, when the training has ended.
    """

    def __init__(self, times: StepTimes, take: Callable[[dict[str, Any], Stopwatch], None]) -> None:
        self.times = times
        self.take = take
        self.seconds: list[dict[str, float]] = []
        self._watch: Stopwatch | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A clock of its own."""
        self._watch = Stopwatch(pl_module.device, self.times.now)
        self._watch.begin(PEER)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Their turn, as often as ours: the last of our steps counts operations and has no counterpart."""
        assert self._watch is not None
        if pl_module.progress.step >= self.times.total:
            return
        with self.times.beside(PEER):
            self._watch.step()  # what passed was ours
            self._watch.base("other")
            self.take(batch, self._watch)
            self._watch.step()
            self._watch.base(PEER)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the clock: every second entry is a step of theirs, and the first of them are for warming up."""
        assert self._watch is not None
        self.seconds = self._watch.read()[1::2][self.times.warmup :]
        for step in self.times.seconds:
            step.pop(PEER, None)
