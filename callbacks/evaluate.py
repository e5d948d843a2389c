"""Scores of generated pictures, at several moments of a training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from callbacks.journal import cost_of, pause
from callbacks.pictures import draw_labels, evaluation_mode, generate
from callbacks.prompts import Wanted, captions_for, taken
from callbacks.score_log import FILE, append_scores, score_lines, shown
from repalign.metrics.suite import FeatureMetrics, SeveralFeatures, spaces_of
from repalign.training.generate import asked_by


class Evaluate(pl.Callback):
    """Draws pictures with the averaged weights, compares them with the data, logs ``eval/<name>``: before the first
    step, every so many steps, and after the last one.

    Every rank scores what it draws; rank 0 gathers moments and features, in the order of the serial numbers. So the
    number depends neither on the batch size nor on the number of ranks. ``metrics.jsonl`` in the run folder gets every
    number with its protocol and interval, as ``task=evaluate`` writes them.

    Args:
        every: steps between two evaluations.
        num_samples: generated pictures. Frechet distances are comparable at equal numbers alone.
        metrics: what is measured.
        cache: the statistics of the real pictures are kept in ``reference`` below it.
        labels: classes of the pictures: ``data`` (as frequent as in the data set), ``uniform`` or ``balanced``.
        seed: of noise and labels; every evaluation draws the same ones.
        batch_size: pictures at once, on each rank.
    """

    def __init__(
        self,
        every: int,
        num_samples: int,
        metrics: FeatureMetrics | SeveralFeatures,
        cache: str,
        labels: str = "data",
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.every = every
        self.num_samples = num_samples
        self.metrics = metrics
        self.cache = Path(cache) / "reference"
        self.label_kind = labels
        self.seed = seed
        self.batch_size = batch_size
        self._done = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The scores before the first step; a resumed run has them already."""
        if pl_module.progress.step == 0:
            self._evaluate(trainer, pl_module)
        self._done = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when the step is due."""
        if pl_module.progress.step != self._done and pl_module.progress.step % self.every == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last scores."""
        if pl_module.progress.step != self._done:
            self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = step = pl_module.progress.step
        began = time.perf_counter()
        data = trainer.datamodule
        classes, pool = range(data.num_classes), data.source.labels
        wanted: Wanted
        if asked_by(pl_module.conditioner) == "caption":
            wanted = captions_for(self.num_samples, data.captions, None, "data.caption")
        else:
            key = "callbacks.evaluate.labels"
            wanted = draw_labels(self.label_kind, self.num_samples, self.seed, classes, pool, key)
        spaces = spaces_of(self.metrics).values()
        for space in spaces:
            space.to(pl_module.device).reset()
            space.captions = None if isinstance(wanted, torch.Tensor) else wanted
            if trainer.is_global_zero and space.reference is None and space.reads_reference:
                space.prepare(lambda: data.reference_images(self.batch_size), data.fingerprint, self.cache)
        with evaluation_mode(pl_module):
            self._draw(trainer, pl_module, wanted)
        if trainer.world_size > 1:
            for space in spaces:
                space.gather()
        if trainer.is_global_zero:
            values = self.metrics.compute()
            lines = score_lines(self.metrics, values, self._drawing(pl_module), step)
            for warning in append_scores(Path(pl_module.run_dir) / FILE, lines):
                print(f"warning: {warning}", flush=True)
            row = {f"eval/{name}": value for name, value in values.items()} | cost_of(trainer, step)
            for logger in trainer.loggers:
                logger.log_metrics(row, step=step)
            print(
                f"step {step} | {' | '.join(shown(values))} | {self.num_samples} pictures, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
        for space in spaces:
            space.reset()
            space.to(torch.device("cpu"))
        pause(trainer)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, wanted: Wanted) -> None:
        generator = pl_module.generator(ema=True)
        rank, size = trainer.global_rank, self.batch_size
        for start in range(0, self.num_samples, size * trainer.world_size):
            # Every rank takes part in every round, with the same number of pictures: sharded weights are gathered
            # together. Serial numbers past the end are drawn and dropped.
            serials = range(start + rank * size, start + (rank + 1) * size)
            if trainer.world_size == 1:
                serials = serials[: self.num_samples - start]
            part = taken(wanted, [serial % self.num_samples for serial in serials])
            (images,) = generate(generator, part, self.seed, size, pl_module.device, serials)
            kept = max(0, min(len(serials), self.num_samples - serials.start))
            if kept:
                self.metrics.update(images[:kept], torch.tensor(serials[:kept]))

    def _drawing(self, pl_module: pl.LightningModule) -> dict[str, Any]:
        """How the pictures were drawn, for the protocol; sampler and guidance are in the run's configuration."""
        told = {
            "labels": self.label_kind,
            "rounding": "round",
            "seed": self.seed,
            "ema": True,
            "dtype": f"float32, matmul {torch.get_float32_matmul_precision()}",
        }
        config = Path(pl_module.run_dir) / "config.yaml"
        if config.is_file():
            composed = yaml.safe_load(config.read_text(encoding="utf-8"))
            told |= {key: composed.get(key) for key in ("sampler", "guidance")}
        return told
