"""Latents that REPA's official preparation wrote, taken into the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from datamodules.cache import as_float, bookkeeping, header_of, manifest_for, store_folder
from datamodules.own_store import MOMENTS, ensure_store
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

    They are stored in float32, as they are in the files.

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
    _check_first(first[0], source, autoencoder, folder)
    header = header_of(source, "latents", fingerprint, 1, "float32")

    def arrays_of(rows: range, advance: Advance) -> dict[str, np.ndarray]:
        moments = np.empty((len(rows), *first.shape), dtype=np.float32)
        for place, row in enumerate(rows):
            moments[place] = _moments(folder / files[row])
            advance(1)
        return {MOMENTS: moments, **bookkeeping(source, np.array(rows), True)}

    def plan() -> Manifest:
        return manifest_for(source, header, arrays_of(range(1), lambda steps: None))

    target = store_folder(root, source, "latents", fingerprint)
    return ensure_store(target, "importing latents", plan, arrays_of, header=header)


def _moments(path: Path) -> np.ndarray:
    """Mean and standard deviation, float32 [2, C, h, w]."""
    try:
        return np.stack(np.split(np.load(path, allow_pickle=False).astype(np.float32), 2))
    except (OSError, ValueError) as error:
        raise UserError(
            f"task.repa_latents: cannot read '{path}' as mean and std ({error}); restore the file"
        ) from error


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


def _check_first(mean: np.ndarray, source: PictureSource, autoencoder: Autoencoder, folder: Path) -> None:
    with torch.no_grad():
        expected = autoencoder.encode(as_float(source.load([0])[0])).mean[0].numpy()
    if mean.shape != expected.shape:
        raise UserError(f"task.repa_latents: latents in '{folder}' are {mean.shape}, expected {expected.shape}")
    if (difference := float(np.abs(mean - expected).mean())) > TOLERANCE:
        raise UserError(
            f"task.repa_latents: the first latent in '{folder}' differs by {difference:.3f} from what this autoencoder "
            f"gives for the first picture, expected less than {TOLERANCE}; another autoencoder or other pictures?"
        )
