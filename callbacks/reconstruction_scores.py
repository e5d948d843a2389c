"""Scores of reconstructions, at several moments of an autoencoder's training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn

from callbacks.journal import cost_of, pause
from callbacks.pictures import evaluation_mode, evenly_spaced
from repalign.metrics.reconstruction import ReconstructionMetrics
from repalign.metrics.suite import FeatureMetrics


@torch.no_grad()
def score_reconstructions(
    autoencoder: nn.Module,
    data: Any,
    features: FeatureMetrics,
    cache: Path,
    num_samples: int,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """L1, PSNR, SSIM, LPIPS if asked for, and the feature scores of reconstructions against the same pictures.

    Args:
        autoencoder: in evaluation mode, with parameters; decodes posterior means.
        data: data module; the pictures are evenly spaced over it.
        features: scores between the two sets (r-FID, r-FD); they depend on the number of pictures.
        cache: the statistics of the pictures are kept in ``reference`` below it.
        num_samples: pictures; all of them when there are fewer.
        perceptual: distance of two batches in [-1, 1].
        batch_size: pictures at once.
    """
    device = next(autoencoder.parameters()).device
    count = min(num_samples, len(data.dataset))

    def pictures() -> Iterator[Float[Tensor, "b 3 h w"]]:
        chosen = evenly_spaced(count, len(data.dataset))
        for start in range(0, count, batch_size):
            yield data.images(chosen[start : start + batch_size]).float() / 255

    features.to(device).reset()
    if isinstance(perceptual, nn.Module):
        perceptual.to(device)
    features.prepare(pictures, f"{data.fingerprint}/{count}", cache / "reference")
    metrics = ReconstructionMetrics(perceptual, features)
    for images in pictures():
        images = images.to(device)
        metrics.update(images, autoencoder.decode(autoencoder.encode(images).mean))
    values = metrics.compute()
    metrics.reset()
    features.to(torch.device("cpu"))
    return values


def in_words(values: dict[str, float]) -> str:
    """The scores as one line; deviations between parts are left out."""
    return " | ".join(f"{name} {value:.4g}" for name, value in values.items() if not name.endswith("_std"))


class ReconstructionScores(pl.Callback):
    """Logs ``eval/rec_<name>`` before the first step, every so many steps, and after the last one.

    Rank 0 does all of it; the others wait.

    Args:
        every: steps between two measurements.
        metrics: feature scores between pictures and reconstructions.
        cache: the statistics of the pictures are kept below it.
        num_samples: pictures. Frechet distances are comparable at equal numbers alone.
        perceptual: LPIPS; None leaves it out.
        batch_size: pictures at once.
    """

    def __init__(
        self,
        every: int,
        metrics: FeatureMetrics,
        cache: str,
        num_samples: int = 5000,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        batch_size: int = 64,
    ) -> None:
        self.every = every
        self.metrics = metrics
        self.cache = Path(cache)
        self.num_samples = num_samples
        self.perceptual = perceptual
        self.batch_size = batch_size
        self._done = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The scores before the first step; a resumed run has them already."""
        if pl_module.progress.step == 0:
            self._score(trainer, pl_module)
        self._done = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure when the step is due."""
        if pl_module.progress.step != self._done and pl_module.progress.step % self.every == 0:
            self._score(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last scores."""
        if pl_module.progress.step != self._done:
            self._score(trainer, pl_module)

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = step = pl_module.progress.step
        began = time.perf_counter()
        if trainer.is_global_zero:
            with evaluation_mode(pl_module):
                values = score_reconstructions(
                    pl_module.autoencoder,
                    trainer.datamodule,
                    self.metrics,
                    self.cache,
                    self.num_samples,
                    self.perceptual,
                    self.batch_size,
                )
            row = {f"eval/rec_{name}": value for name, value in values.items()} | cost_of(trainer, step)
            for logger in trainer.loggers:
                logger.log_metrics(row, step=step)
            print(f"step {step} | {in_words(values)} | {time.perf_counter() - began:.0f} s", flush=True)
        pause(trainer)
