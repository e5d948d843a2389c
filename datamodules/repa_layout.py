"""Latents that REPA's official preparation wrote, taken into the cache."""

from __future__ import annotations

from pathlib import Path

from datamodules.layouts.pairing import import_latents
from datamodules.layouts.repa import REPALatents
from datamodules.source import PictureSource
from datamodules.store import ArrayStore
from repalign.protocols import Autoencoder


def import_repa_latents(
    source: PictureSource, autoencoder: Autoencoder, fingerprint: str, folder: str | Path, root: Path
) -> ArrayStore:
    """What ``task.repa_latents`` asks for; see :func:`datamodules.layouts.pairing.import_latents`."""
    files = REPALatents(folder, len(source.class_names), key="task.repa_latents")
    return import_latents(source, autoencoder, fingerprint, files, root)
