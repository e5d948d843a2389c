"""task=fit_pca: principal components of an encoder's patch tokens, into a file with hash and provenance."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from datamodules.base import ImageDataModule
from datamodules.progress import progress
from repalign.encoders.pca import PCA, PCAFit
from repalign.errors import UserError, unknown_choice
from repalign.protocols import Encoder
from tasks.instantiate import build, check_targets


def run(cfg: DictConfig) -> None:
    """Fit on pictures of the composed data and write the file.

    Raises:
        UserError: one line for whatever the person can mend.
    """
    check_targets(cfg)
    task = cfg.task
    if task.encoder not in cfg.encoders:
        raise unknown_choice("task.encoder", task.encoder, cfg.encoders, "encoder; choose one by encoder=...")
    data = build(cfg.data, "data")
    encoder = build(cfg.encoders[task.encoder], f"encoders.{task.encoder}")
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    pca = fit_pca(data, encoder, task.pictures, task.components, task.batch_size, task.seed, device)
    target = Path(task.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.incomplete")
    pca.save(partial)
    os.replace(partial, target)
    share = (pca.variance[:8].sum() / encoder.spec.dim).item()
    print(
        f"wrote {target}: {len(pca.components)} components of {encoder.spec.dim} dimensions from "
        f"{pca.provenance['tokens']} tokens; the first 8 hold {share:.1%} of the variance; "
        f"fingerprint {pca.fingerprint}",
        flush=True,
    )


def fit_pca(
    data: ImageDataModule,
    encoder: Encoder,
    pictures: int,
    components: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PCA:
    """Components of the patch tokens of pictures that are drawn at random, without repetition.

    Args:
        data: the pictures, never mirrored.
        encoder: its class and register tokens have no part in it.
        pictures: how many; all when the data has fewer.
        components: how many are kept; None for all.
        batch_size: pictures per call.
        seed: of the choice of pictures.
        device: where the encoder runs.

    Raises:
        UserError: for no picture, or fewer tokens than the encoder is wide.
    """
    if pictures < 1:
        raise UserError(f"task.pictures: expected 1 or more, found {pictures}")
    data.setup("fit")
    total = len(data.source)
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(total)[:pictures]
    if isinstance(encoder, torch.nn.Module):
        encoder.to(device)
    fit = PCAFit(encoder.spec.dim, device)
    with progress("components", len(chosen)) as advance, torch.no_grad():
        for first in range(0, len(chosen), batch_size):
            images = data.images(chosen[first : first + batch_size].tolist()).to(device)
            fit.update(encoder(images.float() / 255).patches.data)
            advance(len(images))
    provenance = {
        "encoder": str(getattr(encoder, "fingerprint", "")),
        "data": str(data.fingerprint),
        "pictures": str(len(chosen)),
        "tokens": str(fit.count),
        "seed": str(seed),
    }
    return fit.finish(components, provenance)
