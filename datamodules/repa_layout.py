"""Latents that REPA's official preparation wrote, taken into the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from datamodules.cache import as_float, manifest_for, store_folder
from datamodules.own_store import ensure_store
from datamodules.progress import Advance
from datamodules.source import PictureSource
from datamodules.store import ArrayStore, Manifest
from repalign.errors import UserError
from repalign.protocols import Autoencoder

TOLERANCE = 0.05  # mean absolute difference of the first picture's latents; another autoencoder is off by about 1


def import_repa_latents(
    source: PictureSource, autoencoder: Autoencoder, fingerprint: str, folder: str | Path, root: Path
) -> ArrayStore:
    """Store REPA's ``vae-sd`` files as our cached latents of the same pictures, so that nothing is encoded again.

    REPA keeps one .npy per picture, [2C, h, w] = mean and standard deviation, and ``dataset.json`` with the labels;
    pictures (``images``) and latents are paired by their place in alphabetical order.

    Args:
        source: the pictures, ``ImageFolder(root='<REPA's folder>/images')``.
        autoencoder: that made the latents; the first picture is encoded to see that it is the same one.
        fingerprint: of that autoencoder.
        folder: REPA's ``vae-sd``.
        root: of the cache.

    Raises:
        UserError: when numbers, labels or latents do not belong to these pictures.
    """
    folder = Path(folder)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npy"))
    if len(files) != len(source):
        raise UserError(f"task.repa_latents: found {len(files)} .npy files in '{folder}', expected {len(source)}")
    _check_labels(folder, files, source)
    first = _moments(folder / files[0])
    _check_first(first, source, autoencoder, folder)

    def plan() -> Manifest:
        row = {**{key: value[None] for key, value in first.items()}, **_bookkeeping(source, range(1))}
        return manifest_for(source, "latents", fingerprint, 1, row)

    def make(rows: range, advance: Advance) -> dict[str, np.ndarray]:
        parts = []
        for row in rows:
            parts.append(_moments(folder / files[row]))
            advance(1)
        return {**{key: np.stack([part[key] for part in parts]) for key in first}, **_bookkeeping(source, rows)}

    return ensure_store(store_folder(root, source, "latents", fingerprint), "importing latents", plan, make)


def _moments(path: Path) -> dict[str, np.ndarray]:
    try:
        both = np.load(path, allow_pickle=False)
        mean, std = np.split(both.astype(np.float32), 2)
    except (OSError, ValueError) as error:
        raise UserError(
            f"task.repa_latents: cannot read '{path}' as mean and std ({error}); restore the file"
        ) from error
    return {"moments_mean": mean, "moments_std": std}


def _bookkeeping(source: PictureSource, rows: range) -> dict[str, np.ndarray]:
    index = np.arange(rows.start, rows.stop, dtype=np.int64)
    return {"index": index, "label": source.labels[index]}


def _check_labels(folder: Path, files: list[str], source: PictureSource) -> None:
    path = folder / "dataset.json"
    if not path.is_file():
        raise UserError(f"task.repa_latents: no '{path}'; expected the labels that REPA's preparation writes there")
    labels = dict(json.loads(path.read_bytes())["labels"])
    for file, expected in zip(files, source.labels.tolist(), strict=True):
        if labels.get(file) != expected:
            raise UserError(
                f"task.repa_latents: '{path}' gives label {labels.get(file)} to '{file}', the picture has {expected}"
            )


def _check_first(found: dict[str, np.ndarray], source: PictureSource, autoencoder: Autoencoder, folder: Path) -> None:
    with torch.no_grad():
        expected = autoencoder.encode(as_float(source.load([0])[0])).mean[0].numpy()
    mean = found["moments_mean"]
    if mean.shape != expected.shape:
        raise UserError(f"task.repa_latents: latents in '{folder}' are {mean.shape}, expected {expected.shape}")
    if (difference := float(np.abs(mean - expected).mean())) > TOLERANCE:
        raise UserError(
            f"task.repa_latents: the first latent in '{folder}' differs by {difference:.3f} from what this autoencoder "
            f"gives for the first picture, expected less than {TOLERANCE}; another autoencoder or other pictures?"
        )
