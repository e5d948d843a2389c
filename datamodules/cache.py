"""Latents, encoder features and text features, computed once over a set of pictures and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.outputs import Outputs
from datamodules.own_store import Share, ensure_store, make_share
from datamodules.progress import Advance
from datamodules.source import Cropped, PictureSource
from datamodules.store import TEXT, ArraySpec, ArrayStore, Manifest, Verify
from repalign.errors import UserError

# Arrays of every cached store beside its own; batches take these from the pictures.
BOOKKEEPING = ("index", "label", "caption", "original_size")
STALLED_AFTER = 120.0  # seconds without a batch from reading processes or memory maps before the run ends
# Software that pixels, networks and files depend on; recorded, not compared.
VERSIONS = ("diffusers", "numpy", "pillow", "timm", "torch", "transformers")


@dataclass(frozen=True)
class Making:
    """How stores are made; none of it changes what a row holds beyond the last bit.

    Attributes:
        batch: pictures per call of a network.
        workers: processes that read pictures.
        shard_mib: size of the largest file of a shard; a stopped run repeats one shard at most.
        folder: where the stores go, by their plain names; None for the cache.
    """

    batch: int = 32
    workers: int = 0
    shard_mib: float = 256
    folder: Path | None = None


AS_USUAL = Making()


class CachedOutputs:
    """The store of a network's outputs over all pictures: where it lies, what its header says, how its rows are made.

    Row i belongs to picture i; with ``views`` = 2 there are 2 N rows and row N + i is of picture i mirrored left to
    right. Arrays ``index`` and ``label`` say which picture a row really holds: a skipped file is replaced by another.
    Latents also carry ``caption`` and ``original_size`` (height, width) where the pictures have them. Features of
    captions have one row per caption and belong to picture i whatever was skipped.

    Args:
        source: the pictures.
        outputs: of the network.
        root: the cache; the store is ``root/<source.fingerprint>/<name>-<short fingerprint>-<dtype>``.
        views: 2 for the mirrored pictures too.
        making: batch, readers, size of shards, another folder.
        verify: 'hash' or 'size'.

    Raises:
        UserError: when a value is not finite in the type it is stored in, or captions are wanted that are not there.
    """

    def __init__(
        self,
        source: PictureSource,
        outputs: Outputs,
        root: Path,
        views: int = 1,
        making: Making = AS_USUAL,
        verify: Verify = "hash",
    ) -> None:
        if outputs.of_captions and source.captions is None:
            raise UserError(f"text_encoders: {source.fingerprint} has no captions for {outputs.name}; leave it out")
        self.source = source
        self.outputs = outputs
        self.views = 1 if outputs.of_captions else views
        self.making = making
        self.verify: Verify = verify
        if making.folder is None:
            self.folder = store_folder(root, source, outputs.name, outputs.fingerprint, self.views, outputs.dtype)
        else:
            self.folder = making.folder / outputs.name
        self.header = header_of(source, outputs.name, outputs.fingerprint, self.views, outputs.dtype)

    def store(self) -> ArrayStore:
        """Opened when it is there; made, continued or mended when not."""
        title = f"caching {self.outputs.name}"
        return ensure_store(self.folder, title, self.plan, self.make, self.verify, self.header)

    def make_share(self, share: Share) -> bool:
        """Make the shards of one process; returns whether the store is complete."""
        title = f"caching {self.outputs.name}, part {share.part} of {share.parts}"
        return make_share(self.folder, title, self.plan, self.make, share, self.verify, self.header)

    def plan(self) -> Manifest:
        """The manifest before any file is written; one row is computed to see its shape."""
        row = next(self._batches(range(1)))
        return manifest_for(self.source, self.header, row, self.making.shard_mib)

    def make(self, rows: range, advance: Advance) -> dict[str, np.ndarray]:
        """The arrays of these rows."""
        parts = []
        for part in self._batches(rows):
            parts.append(part)
            advance(len(part["index"]))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _batches(self, rows: range) -> Iterator[dict[str, np.ndarray]]:
        size = self.making.batch
        batches = [range(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]
        for inputs, bookkeeping in self._inputs(batches):
            yield {**self._stored(self.outputs.compute(inputs)), **bookkeeping}

    def _inputs(self, batches: list[range]) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        if self.outputs.of_captions:
            assert self.source.captions is not None
            for batch in batches:
                yield [self.source.captions[i] for i in batch], bookkeeping(self.source, np.array(batch), False)
            return
        for images, rest in read(_Views(self.source, self.outputs.name == "latents"), batches, self.making.workers):
            yield images.float() / 255, rest

    def _stored(self, arrays: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        found = {}
        for key, values in arrays.items():
            stored = values.detach().cpu()
            if stored.is_floating_point():
                stored = stored.to(getattr(torch, self.outputs.dtype))
            if not stored.isfinite().all():
                raise UserError(
                    f"'{self.folder}': '{key}' has values that are not finite in {self.outputs.dtype} (largest before: "
                    f"{values.abs().max().item():.3g}); set {self.outputs.option}=float32, or look for the fault in "
                    "the network"
                )
            found[key] = stored.numpy()
        return found


def read(dataset: Dataset[Any], batches: list[Any], workers: int) -> Iterator[Any]:
    """What a data set gives for these batches of rows, in their order, read by so many processes.

    Raises:
        UserError: that it gave instead of a batch.
    """
    workers = min(workers, len(batches) - 1)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=whole_batch,
        timeout=STALLED_AFTER if workers else 0,
        generator=torch.Generator(),  # the loader draws a seed from it: the global one stays as it was
    )
    for found in loader:
        if isinstance(found, UserError):
            raise found
        yield found


class _Views(Dataset[Any]):
    """Batches of pictures with what is stored beside them, for reading processes."""

    def __init__(self, source: PictureSource, details: bool) -> None:
        self.source = source
        self.details = details

    def __getitems__(self, rows: range) -> tuple[Tensor, dict[str, np.ndarray]] | UserError:
        try:
            images, index = load_views(self.source, rows)
            return torch.from_numpy(images), bookkeeping(self.source, index, self.details)
        except UserError as error:  # handed over as it is: a worker would wrap it into a traceback
            return error


def whole_batch(batch: Any) -> Any:
    """The collate function of batches that are gathered whole already (a function by name, for worker processes)."""
    return batch


def bookkeeping(source: PictureSource, index: np.ndarray, details: bool) -> dict[str, np.ndarray]:
    """What a store keeps of pictures beside the outputs; ``details``: also captions and original sizes, if any."""
    found = {"index": index, "label": source.labels[index]}
    if details and source.captions is not None:
        found["caption"] = np.array([source.captions[i] for i in index], dtype=object)
    if details and isinstance(source, Cropped):
        found["original_size"] = source.original_sizes(index.tolist())
    return found


def store_folder(root: Path, source: PictureSource, name: str, fingerprint: str, views: int, dtype: str) -> Path:
    """Where the outputs of a network for these pictures lie in the cache."""
    return root / source.fingerprint / f"{name}-{short(fingerprint)}-{dtype}{'-views' if views == 2 else ''}"


def header_of(source: PictureSource, name: str, fingerprint: str, views: int, dtype: str) -> dict[str, Any]:
    """What a store must agree in with whoever writes or reads it."""
    return {
        "name": name,
        "fingerprint": fingerprint,
        "source": source.fingerprint,
        "pictures": len(source),
        "image_size": source.image_size,
        "crop": source.crop if isinstance(source, Cropped) else None,
        "views": views,
        "dtype": dtype,
    }


def manifest_for(
    source: PictureSource, header: Mapping[str, Any], row: Mapping[str, np.ndarray], shard_mib: float = 256
) -> Manifest:
    """The manifest of a store of outputs, before any file is written; ``row`` shows the arrays of one row."""
    specs = {
        key: ArraySpec(TEXT if value.dtype == object else value.dtype.name, value.shape[1:])
        for key, value in row.items()
    }
    shard_rows = max(1, int(shard_mib * 2**20) // max(spec.bytes_per_row for spec in specs.values()))
    info = {
        **header,
        "class_names": list(source.class_names),
        "attribution": source.attribution,
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
    }
    return Manifest(header["views"] * len(source), shard_rows, specs, info)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
