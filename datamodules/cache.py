"""Latents and encoder features, computed once over a set of pictures and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.own_store import ensure_store
from datamodules.progress import Advance
from datamodules.source import PictureSource
from datamodules.store import ArraySpec, ArrayStore, Manifest, Verify
from repalign.errors import UserError

Compute = Callable[[Tensor], Mapping[str, Tensor]]

SHARD_BYTES = 256 * 2**20
BOOKKEEPING = ("index", "label")  # arrays of every cached store beside its own


def ensure_cached(
    source: PictureSource,
    name: str,
    fingerprint: str,
    compute: Compute,
    *,
    root: Path,
    dtype: str = "float32",
    both_views: bool = False,
    batch_size: int = 32,
    verify: Verify = "hash",
) -> ArrayStore:
    """The store of ``compute`` over all pictures: opened when it is there, made, continued or mended when not.

    Row i belongs to picture i; with ``both_views`` there are 2 N rows and row N + i is of picture i mirrored left to
    right. Arrays ``index`` and ``label`` say which picture a row really holds: a skipped file is replaced by another.

    Args:
        source: the pictures.
        name: what is stored, for folder and progress bar ('latents', 'features_main').
        fingerprint: stands for everything that ``compute`` depends on (network, weights, preprocessing).
        compute: images [B, 3, H, W] in [0, 1] on the CPU -> arrays [B, ...] by name.
        root: the cache; the store is ``root/<source.fingerprint>/<name>-<short fingerprint>``.
        dtype: of what is stored, 'float32' or 'float16'.
        both_views: also store the mirrored pictures.
        batch_size: pictures per call of ``compute``.
        verify: 'hash' or 'size'.

    Raises:
        UserError: when a value is not finite in ``dtype``.
    """
    views = 2 if both_views else 1
    folder = store_folder(root, source, name, fingerprint, views)

    def arrays_of(rows: range) -> dict[str, np.ndarray]:
        images, index = load_views(source, rows)
        found = {key: _checked(value, key, dtype, folder) for key, value in compute(as_float(images)).items()}
        return {**found, "index": index, "label": source.labels[index]}

    def plan() -> Manifest:
        return manifest_for(source, name, fingerprint, views, arrays_of(range(1)))

    def make(rows: range, advance: Advance) -> dict[str, np.ndarray]:
        parts = []
        for first in range(rows.start, rows.stop, batch_size):
            batch = range(first, min(first + batch_size, rows.stop))
            parts.append(arrays_of(batch))
            advance(len(batch))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    return ensure_store(folder, f"caching {name}", plan, make, verify)


def store_folder(root: Path, source: PictureSource, name: str, fingerprint: str, views: int = 1) -> Path:
    """Where the outputs of a network for these pictures lie."""
    return root / source.fingerprint / f"{name}-{short(fingerprint)}{'-views' if views == 2 else ''}"


def manifest_for(
    source: PictureSource, name: str, fingerprint: str, views: int, row: Mapping[str, np.ndarray]
) -> Manifest:
    """The manifest of a store of outputs, before any file is written; ``row`` shows the arrays of one row."""
    specs = {key: ArraySpec(value.dtype.name, value.shape[1:]) for key, value in row.items()}
    shard_rows = max(1, SHARD_BYTES // max(spec.bytes_per_row for spec in specs.values()))
    info = {
        "name": name,
        "fingerprint": fingerprint,
        "pictures": len(source),
        "views": views,
        "image_size": source.image_size,
        "class_names": list(source.class_names),
        "source": source.fingerprint,
        "attribution": source.attribution,
    }
    return Manifest(views * len(source), shard_rows, specs, info)


def short(fingerprint: str) -> str:
    """16 hexadecimal digits for a fingerprint of any length and any characters: part of a folder name."""
    return hashlib.blake2b(fingerprint.encode(), digest_size=8).hexdigest()


def load_views(source: PictureSource, rows: range | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [B, 3, H, W] and their indices; rows from N on are mirrored pictures."""
    wanted = np.asarray(rows, dtype=np.int64)
    images, index = source.load((wanted % len(source)).tolist())
    return mirror(images, wanted >= len(source)), index


def mirror(images: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Mirror the pictures [B, 3, H, W] for which ``flip`` [B] holds, left to right."""
    return np.where(flip[:, None, None, None], images[..., ::-1], images) if flip.any() else images


def as_float(images: np.ndarray) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 in [0, 1]."""
    return torch.from_numpy(images).float() / 255


def _checked(values: Tensor, key: str, dtype: str, folder: Path) -> np.ndarray:
    stored = values.detach().cpu().to(getattr(torch, dtype))
    if not stored.isfinite().all():
        raise UserError(
            f"'{folder}': '{key}' has values that are not finite in {dtype} (largest before: "
            f"{values.abs().max().item():.3g}); set data.feature_dtype=float32, or look for the fault in the network"
        )
    return stored.numpy()
