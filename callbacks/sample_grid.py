"""Pictures from fixed noise, at several moments of a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Int
from torch import Tensor

from callbacks.journal import pause
from callbacks.pictures import class_indices, evaluation_mode, generate, grid_of, save_png
from callbacks.prompts import Wanted, captions_for
from repalign.training.generate import asked_by


class SampleGrid(pl.Callback):
    """``samples/step_000500_{raw,ema}.png`` and the loggers that take pictures: before the first step, every so many
    steps, and after the last one.

    A row is a class, or a caption where the method reads captions; a cell has the same noise at every step and for both
    kinds of weights: what changes between two grids is the network. Every rank draws the same grid (sharded weights
    need all of them), rank 0 writes it.

    Args:
        every: steps between two grids.
        classes: one row each, by number or name; None: all of them, or ``max_rows`` evenly spaced ones.
        prompts: one row each, for a method that reads captions; None: ``max_rows`` captions of the data, evenly spaced.
        columns: pictures of a class.
        max_rows: see ``classes``.
        seed: of the noise.
        batch_size: pictures at once.
    """

    def __init__(
        self,
        every: int = 5000,
        classes: Sequence[int | str] | None = None,
        columns: int = 8,
        max_rows: int = 10,
        seed: int = 0,
        batch_size: int = 64,
        prompts: Sequence[str] | None = None,
    ) -> None:
        self.every = every
        self.classes = classes
        self.columns = columns
        self.max_rows = max_rows
        self.seed = seed
        self.batch_size = batch_size
        self.prompts = prompts
        self._drawn = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The grid before the first step; a resumed run has it already."""
        if pl_module.progress.step == 0:
            self._draw(trainer, pl_module)
        self._drawn = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when the step is due."""
        if pl_module.progress.step != self._drawn and pl_module.progress.step % self.every == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last grid."""
        if pl_module.progress.step != self._drawn:
            self._draw(trainer, pl_module)

    def labels(self, class_names: Sequence[str]) -> Int[Tensor, " n"]:
        """Class of each cell, row by row.

        Raises:
            UserError: for a class that the data does not have.
        """
        if self.classes is None:
            rows = torch.linspace(0, len(class_names) - 1, min(len(class_names), self.max_rows)).round().long()
        else:
            rows = torch.tensor(class_indices(self.classes, class_names, "callbacks.sample_grid.classes"))
        return rows.repeat_interleave(self.columns)

    def captions(self, of_data: Sequence[str] | None) -> list[str]:
        """Caption of each cell, row by row.

        Raises:
            UserError: when neither prompts nor captions of the data are there.
        """
        rows = self.max_rows if self.prompts is None else len(self.prompts)
        found = captions_for(rows, of_data, self.prompts, "callbacks.sample_grid.prompts")
        return [caption for caption in found for _ in range(self.columns)]

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drawn = step = pl_module.progress.step
        data = trainer.datamodule
        by_caption = asked_by(pl_module.conditioner) == "caption"
        wanted: Wanted = self.captions(data.captions) if by_caption else self.labels(data.class_names)
        by_weights: list[Tensor] = []
        for name, ema in (("raw", False), ("ema", True)):
            with evaluation_mode(pl_module):
                drawn = generate(pl_module.generator(ema=ema), wanted, self.seed, self.batch_size, pl_module.device)
                by_weights.append(torch.cat([images.cpu() for images in drawn]))
            if trainer.is_global_zero:
                grid = grid_of(by_weights[-1], self.columns)
                save_png(grid, pl_module.run_dir / "samples" / f"step_{step:06d}_{name}.png")
                for logger in trainer.loggers:
                    log_picture(logger, f"grids/{name}", grid, step)
        if trainer.is_global_zero:
            asked = wanted[:: self.columns]
            words = [data.class_names[int(x)] for x in asked] if isinstance(asked, Tensor) else list(asked)
            for logger in trainer.loggers:
                if hasattr(logger, "log_samples"):
                    rows = table_of(words, by_weights, self.columns, step)
                    logger.log_samples("grids/samples", ("step", "asked for", "live", "averaged"), rows, step)
        pause(trainer)


def table_of(words: Sequence[str], by_weights: Sequence[Tensor], columns: int, step: int) -> list[list[Any]]:
    """A row for each class or caption: the step, what was asked for, and a strip [Y, X, 3] for each kind of weights."""
    strips = [[grid_of(row, columns).permute(1, 2, 0).numpy() for row in x.split(columns)] for x in by_weights]
    return [[step, word, *pictures] for word, *pictures in zip(words, *strips, strict=True)]


def log_picture(logger: Any, name: str, image: Tensor, step: int) -> None:
    """Hand a picture [3, Y, X] to a logger that takes pictures (W&B, TensorBoard); others have the file."""
    if hasattr(logger, "log_image"):
        logger.log_image(name, [image.permute(1, 2, 0).numpy()], step=step)
    elif hasattr(logger.experiment, "add_image"):
        logger.experiment.add_image(name, image, step)
