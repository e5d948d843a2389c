"""Batches by serial number: pictures, labels, cached latents and features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.cache import BOOKKEEPING, mirror
from datamodules.sampler import Key
from datamodules.source import PictureSource
from datamodules.store import ArrayStore
from repalign.random import SampleRandom


class SerialDataset(Dataset[dict[str, Any]]):
    """Gathers whole batches for keys (serial number, index).

    A batch is a dict: ``label``, ``serial``, ``index`` int64 [B]; ``image`` uint8 [B, 3, H, W] when ``with_images``;
    every array of the stores under its own name, as float32 (``moments_mean``, ``moments_std``, ``features/<name>``);
    ``caption``, a list of texts, when the pictures have them.

    A picture is mirrored when U(seed, serial, 'flip') < 1/2: neither worker nor rank has a say in it.

    Args:
        source: the pictures and their labels.
        seed: of the mirroring.
        horizontal_flip: whether pictures are mirrored at random.
        stores: cached rows, see :func:`datamodules.cache.ensure_cached`.
        with_images: whether batches carry pictures.
        redirect: index -> index that is read instead (damaged rows of a store that are to be skipped); None for none.
    """

    def __init__(
        self,
        source: PictureSource,
        seed: int = 0,
        horizontal_flip: bool = False,
        stores: Sequence[ArrayStore] = (),
        with_images: bool = True,
        redirect: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.stores = tuple(stores)
        self.with_images = with_images
        self.redirect = redirect

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Any]:
        """A whole batch: one gather per array instead of one read per sample."""
        serial, index = (np.array(column, dtype=np.int64) for column in zip(*keys, strict=True))
        if self.redirect is not None:
            index = self.redirect[index]
        flip = self._flip(serial)
        batch: dict[str, Any] = {}
        row = index
        for store in self.stores:
            rows = row + flip * len(self.source)
            for name in store.arrays:
                if name not in BOOKKEEPING:
                    batch[name] = torch.from_numpy(store.gather(name, rows).astype(np.float32, copy=False))
            index = store.gather("index", rows)
        if self.with_images:
            images, index = self.source.load(index.tolist())
            batch["image"] = torch.from_numpy(mirror(images, flip))
        batch["label"] = torch.from_numpy(self.source.labels[index])
        batch["serial"] = torch.from_numpy(serial)
        batch["index"] = torch.from_numpy(index)
        if self.source.captions is not None:
            batch["caption"] = [self.source.captions[i] for i in index]
        return batch

    def _flip(self, serial: np.ndarray) -> np.ndarray:
        if not self.horizontal_flip:
            return np.zeros(len(serial), dtype=bool)
        return SampleRandom(self.seed, serial.tolist()).uniform("flip").numpy() < 0.5


def whole_batch(batch: Any) -> Any:
    """The collate function of batches that are gathered whole already (a function by name, for worker processes)."""
    return batch
