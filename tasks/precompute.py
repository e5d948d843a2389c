"""task=precompute: latents and encoder features of a data set, computed once and kept in the cache.

Training does the same for itself at its start; this task does it alone, on another machine for instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig

from datamodules.base import ImageDataModule
from datamodules.repa_layout import import_repa_latents
from repalign.protocols import Autoencoder, Encoder
from tasks.instantiate import build, check_targets


def run(cfg: DictConfig) -> None:
    """Compose the data and the frozen networks, fill the cache, say where it is.

    Raises:
        UserError: one line for whatever the person can mend.
    """
    check_targets(cfg)
    data = build(cfg.data, "data")
    autoencoder = build(cfg.autoencoder, "autoencoder")
    encoders = build(cfg.encoders, "encoders")
    device = "cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu"
    folders = precompute(data, autoencoder, encoders, device, cfg.task.batch_size, cfg.task.repa_latents)
    for name, folder in folders.items():
        print(f"{name}: {folder}", flush=True)


def precompute(
    data: ImageDataModule,
    autoencoder: Autoencoder | None,
    encoders: Mapping[str, Encoder],
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    repa_latents: str | Path | None = None,
) -> dict[str, Path]:
    """Make or check every store that training with these parts reads, and let the data's batches carry them.

    Args:
        data: the pictures; its options say what is cached, in which type, and whether both views are.
        autoencoder: None when it is not frozen.
        encoders: by name.
        device: where the networks run.
        batch_size: pictures per call of a network.
        repa_latents: REPA's folder ``vae-sd`` of the same pictures: taken over instead of encoding (no mirrored views).

    Returns:
        Folder of each store by name.
    """
    data.setup("fit")
    if repa_latents is not None and autoencoder is not None:
        fingerprint = str(autoencoder.fingerprint)  # type: ignore[attr-defined]
        import_repa_latents(data.source, autoencoder, fingerprint, repa_latents, data.cache_root)
    data.attach_cache(autoencoder, encoders, device, batch_size)
    return {name: store.folder for name, store in data.stores.items()}
