"""Foreign latents and the pictures they were made from: whether they belong together, and the way into the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.cache import as_float, header_of, manifest_for, store_folder
from datamodules.layouts.latent_files import LatentFiles, LatentRows
from datamodules.own_store import MOMENTS, ensure_store
from datamodules.progress import Advance
from datamodules.source import PictureSource
from datamodules.store import ArrayStore, Manifest, Verify
from repalign.errors import UserError
from repalign.protocols import Autoencoder

TOLERANCE = 0.05  # mean absolute difference of the first picture's latents; another autoencoder is off by about 1

_CHUNK = 256  # rows read at a time


def check_pairs(files: LatentFiles, source: PictureSource) -> None:
    """Latents and pictures are as many and have the same labels, row by row.

    Raises:
        UserError: naming the first difference.
    """
    if len(files) != len(source):
        raise UserError(f"{files.key}: found {len(files)} latents in '{files.root}', expected {len(source)}")
    wrong = np.flatnonzero(files.labels != source.labels)
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{files.key}: {files.place(row)} has label {files.labels[row]}, the picture has {source.labels[row]}; "
            "expected the same pictures in the same order"
        )


def check_first(files: LatentFiles, source: PictureSource, autoencoder: Autoencoder) -> None:
    """The first picture's latent is the one that this autoencoder gives.

    Raises:
        UserError: when shape or values differ.
    """
    with torch.no_grad():
        mean = autoencoder.encode(as_float(source.load([0])[0])).mean
    assert isinstance(mean, torch.Tensor), "an autoencoder of one stream"
    if files.shape != tuple(mean.shape[1:]):
        raise UserError(f"{files.key}: latents in '{files.root}' are {files.shape}, expected {tuple(mean.shape[1:])}")
    difference = float(np.abs(files.moments(0)["moments_mean"] - mean[0].float().numpy()).mean())
    if difference > TOLERANCE:
        raise UserError(
            f"{files.key}: the first latent in '{files.root}' differs by {difference:.3f} from what this autoencoder "
            f"gives for the first picture, expected less than {TOLERANCE}; another autoencoder or other pictures?"
        )


def info_of(source: PictureSource, fingerprint: str, files: LatentFiles) -> dict[str, Any]:
    """What a store's manifest would say of these latents."""
    header = header_of(source, "latents", fingerprint, 2 if files.has_views else 1, "float32")
    return manifest_for(source, header, {MOMENTS: np.empty((1, 1, *files.shape))}).info


def converted(
    source: PictureSource, rows: LatentRows, fingerprint: str, views: int, root: Path, verify: Verify = "hash"
) -> ArrayStore:
    """A store of ours with the same rows, made at the first call.

    Args:
        source: the pictures, or what stands for them.
        rows: the latents.
        fingerprint: of the autoencoder that is taken to have made them.
        views: 2 to take the mirrored pictures too.
        root: of the cache.
        verify: 'hash' or 'size'.
    """
    header = header_of(source, "latents", fingerprint, views, "float32")

    def gathered(wanted: range) -> dict[str, np.ndarray]:
        found = {name: rows.gather(name, wanted) for name in rows.arrays}
        parts = [found.pop(name) for name in ("moments_mean", "moments_std") if name in found]
        return {MOMENTS: np.stack(parts, 1), **found}

    def plan() -> Manifest:
        return manifest_for(source, header, gathered(range(1)))

    def make(wanted: range, advance: Advance) -> dict[str, np.ndarray]:
        parts = []
        for first in range(wanted.start, wanted.stop, _CHUNK):
            chunk = range(first, min(first + _CHUNK, wanted.stop))
            parts.append(gathered(chunk))
            advance(len(chunk))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    folder = store_folder(root, source, "latents", fingerprint, views, "float32")
    return ensure_store(folder, "importing latents", plan, make, verify, header)


def import_latents(
    source: PictureSource, autoencoder: Autoencoder, fingerprint: str, files: LatentFiles, root: Path
) -> ArrayStore:
    """Store foreign latents as our cached latents of the same pictures, so that nothing is encoded again.

    Args:
        source: the pictures, ``ImageFolder(root='<REPA's folder>/images')``.
        autoencoder: that made the latents; the first picture is encoded to see that it is the same one.
        fingerprint: of that autoencoder.
        files: the latents.
        root: of the cache.

    Raises:
        UserError: when numbers, labels or latents do not belong to these pictures.
    """
    check_pairs(files, source)
    check_first(files, source, autoencoder)
    return converted(source, LatentRows(files, info_of(source, fingerprint, files)), fingerprint, 1, root)
