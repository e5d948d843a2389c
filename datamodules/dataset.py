"""Batches by serial number: pictures, labels, cached latents and features."""

from __future__ import annotations

import faulthandler
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules import cache
from datamodules.cache import BOOKKEEPING, mirror
from datamodules.captions import CaptionMix
from datamodules.own_store import MOMENTS
from datamodules.source import Boxed, PictureSource, Segmented
from datamodules.store import ArrayStore
from repalign.random import SampleRandom

T = TypeVar("T")


class SerialDataset(Dataset[dict[str, Any]]):
    """Gathers whole batches for keys [B, 2]: (serial number, index).

    A batch is a dict: ``label``, ``serial``, ``index`` int64 [B]; ``image`` uint8 [B, 3, H, W] when ``with_images``;
    what the stores hold, in the type it is stored in: ``moments`` [B, 1 or 2, C, h, w], ``features/<name>``,
    ``text/<name>``, ``text_mask/<name>``, ``text_pooled/<name>``; ``caption``, a list of texts, when there are any;
    ``size`` float32 [B, 3] where it is wanted; ``boxes`` float32 [B, M, 5] and ``segmentation`` int64 [B, H, W] when
    the pictures have them.
    The device takes moments apart and converts half precision: one piece and half the bytes to move.

    A picture is mirrored when U(seed, serial, 'flip') < 1/2: neither worker nor rank has a say in it.

    Args:
        source: the pictures and their labels.
        seed: of the mirroring.
        horizontal_flip: whether pictures are mirrored at random.
        stores: cached rows, see :class:`datamodules.cache.CachedOutputs`; ``text_stores`` the same of captions.
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
        self.text_stores: tuple[ArrayStore, ...] = ()
        self.mix: CaptionMix | None = None  # of several captions per picture
        self.sizes: np.ndarray | None = None  # height, width, aspect ratio, float32 [N, 3]
        self._pictures: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.source)

    @property
    def mapped(self) -> bool:
        """Whether batches are copied from memory maps, with nothing to decode, to fetch or to compute."""
        stores = (*self.stores, *self.text_stores)
        stored = self.source.captions is None or any("caption" in store.arrays for store in stores)
        decodes = self.with_images or isinstance(self.source, Segmented)
        return not decodes and stored and all(store.mapped for store in stores)

    def __getitem__(self, key: np.ndarray) -> dict[str, Any]:
        return self.__getitems__(key[None])

    def __getitems__(self, keys: np.ndarray) -> dict[str, Any]:
        """A whole batch: one gather per array instead of one read per sample."""
        serial, index = np.ascontiguousarray(keys.T)
        if self.redirect is not None:
            index = self.redirect[index]
        flip = self._flip(serial)
        batch: dict[str, Any] = {}
        row = index
        for store in self.stores:
            rows = row + flip * len(self.source) if self.horizontal_flip else row
            batch |= _rows(store, rows)
            if "caption" in store.arrays:
                batch["caption"] = store.gather("caption", rows).tolist()
            index = self._pictures_of(store)[rows]
        if self.with_images:
            images, index = self.source.load(index.tolist())
            batch["image"] = torch.from_numpy(mirror(images, flip))
        for store in self.text_stores:
            batch |= _rows(store, index if self.mix is None else self.mix.rows(serial, index))
        batch |= {"label": self.source.labels[index], "serial": serial, "index": index}
        if self.sizes is not None:
            batch["size"] = torch.from_numpy(self.sizes[index])
        if isinstance(self.source, Boxed):
            batch["boxes"] = torch.from_numpy(_mirrored(self.source.boxes(index.tolist()), flip))
        if isinstance(self.source, Segmented):
            maps = self.source.segmentation(index.tolist())[:, None]
            batch["segmentation"] = torch.from_numpy(mirror(maps, flip)[:, 0])
        if self.mix is not None:
            batch.pop("caption", None)  # a store of latents keeps the first one
            if not self.text_stores:
                batch["caption"] = self.mix.texts(serial, index)
        elif self.source.captions is not None and "caption" not in batch:
            batch["caption"] = [self.source.captions[i] for i in index]
        return batch

    def _flip(self, serial: np.ndarray) -> np.ndarray:
        if not self.horizontal_flip:
            return np.zeros(len(serial), dtype=bool)
        return SampleRandom(self.seed, serial.tolist()).uniform("flip").numpy() < 0.5

    def _pictures_of(self, store: ArrayStore) -> np.ndarray:
        """Which picture each row of a store is of, read once: a gather per batch would cost as much as the latents."""
        if id(store) not in self._pictures:
            rows = np.arange(len(store))
            if self.redirect is not None:
                rows = rows[np.isin(rows % len(self.source), self.redirect)]  # the others may lie in a damaged file
            self._pictures[id(store)] = np.full(len(store), -1, dtype=np.int64)
            self._pictures[id(store)][rows] = store.gather("index", rows)
        return self._pictures[id(store)]


def _rows(store: ArrayStore, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """The arrays of a store for these rows."""
    return {name: torch.from_numpy(store.gather(name, rows)) for name in store.arrays if name not in BOOKKEEPING}


def _mirrored(boxes: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Boxes [B, M, 5] of pictures of which some are mirrored; rows of class -1 stay."""
    other = boxes.copy()
    other[..., 1], other[..., 3] = 1 - boxes[..., 3], 1 - boxes[..., 1]
    return np.where((flip[:, None] & (boxes[..., 0] >= 0))[..., None], other, boxes)


class SerialLoader(DataLoader[dict[str, Any]]):
    """Batches of a :class:`SerialDataset` with all arrays as tensors, in the order of the batch sampler.

    Batches that are copied from memory maps are read here, or by one thread that is 2 ``num_workers`` batches ahead:
    the copy is all there is to do, handing a batch from process to process costs ten times as much, and more threads
    get in each other's way (``experiments/latent_store``). Pictures are decoded by ``num_workers`` processes.
    """

    dataset: SerialDataset  # type: ignore[assignment]  # the base class knows no more than a Dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if self.num_workers and not self.dataset.mapped:
            # A tensor from a worker process needs a file descriptor of its own, which takes longer than sending a small
            # array: so labels and numbers come as arrays and become tensors here.
            return map(_as_tensors, super().__iter__())  # not a generator: that would hold on to the batch before
        keys = iter(self.batch_sampler or ())
        return _read_ahead(self._read, keys, 2 * self.num_workers) if self.num_workers else map(self._read, keys)

    def _read(self, keys: Any) -> dict[str, Any]:
        if self.dataset.mapped:
            with _ends_when_stalled(cache.STALLED_AFTER):
                batch = _as_tensors(self.dataset.__getitems__(keys))
        else:
            batch = _as_tensors(self.dataset.__getitems__(keys))
        if not self.pin_memory:
            return batch
        return {name: x.pin_memory() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


@contextmanager
def _ends_when_stalled(seconds: float) -> Iterator[None]:
    """Ends the process, with the place of every thread on standard error, when a read takes so long.

    A memory map whose file system does not answer stops the thread inside the copy, perhaps with the interpreter's
    lock, so that no Python code could raise an error: this clock is a thread of C.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _read_ahead(read: Callable[[Any], T], keys: Iterator[Any], ahead: int) -> Iterator[T]:
    """``map(read, keys)`` by a thread that is so many results ahead of the caller."""
    thread = ThreadPoolExecutor(1, "read-ahead")
    try:
        pending = deque(thread.submit(read, key) for key in islice(keys, ahead))
        for key in keys:
            pending.append(thread.submit(read, key))
            yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _as_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in batch.items()}


def split_moments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """``moments`` [B, 1 or 2, C, h, w] becomes ``moments_mean`` and, if stored, ``moments_std``; nothing is copied."""
    rest = {name: value for name, value in batch.items() if name != MOMENTS}
    if MOMENTS not in batch:
        return rest
    return {**rest, **dict(zip(("moments_mean", "moments_std"), batch[MOMENTS].unbind(1), strict=False))}
