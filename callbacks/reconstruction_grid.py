"""Pictures beside their reconstructions, at several moments of an autoencoder's training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor, nn

from callbacks.journal import pause
from callbacks.pictures import evaluation_mode, evenly_spaced, grid_of, save_png
from callbacks.sample_grid import log_picture


def reconstruction_grid(autoencoder: nn.Module, data: Any, columns: int, rows: int) -> UInt8[Tensor, "3 y x"]:
    """Rows of pictures, evenly spaced over the data set, each above its reconstructions from posterior means.

    Args:
        autoencoder: in evaluation mode, with parameters.
        data: data module.
        columns: pictures in a row.
        rows: pairs of rows.
    """
    shown = evenly_spaced(rows * columns, len(data.dataset))
    images = (data.images(shown).float() / 255).to(next(autoencoder.parameters()).device)
    restored = autoencoder.decode(autoencoder.encode(images).mean)
    return grid_of(rearrange([images, restored], "two (r c) d h w -> (r two c) d h w", c=columns), columns)


class ReconstructionGrid(pl.Callback):
    """``samples/step_000500_raw.png`` and the loggers that take pictures: rows of data, each above its reconstructions.

    The pictures are evenly spaced over the data set and the same at every step; latents are posterior means.

    Args:
        every: steps between two grids; there is one after the last step, too.
        columns: pictures in a row.
        rows: pairs of rows.
    """

    def __init__(self, every: int = 500, columns: int = 16, rows: int = 4) -> None:
        self.every = every
        self.columns = columns
        self.rows = rows
        self._drawn = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run has this grid already; an untrained autoencoder has nothing to show."""
        self._drawn = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when the step is due."""
        step = pl_module.progress.step
        if step != self._drawn and (step % self.every == 0 or step == trainer.max_steps):
            self._drawn = step
            self._draw(trainer, pl_module, step)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        with evaluation_mode(pl_module):
            grid = reconstruction_grid(pl_module.autoencoder, trainer.datamodule, self.columns, self.rows)
        save_png(grid, pl_module.run_dir / "samples" / f"step_{step:06d}_raw.png")
        for logger in trainer.loggers:
            log_picture(logger, "grids/reconstructions", grid, step)
        pause(trainer)
