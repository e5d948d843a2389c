"""Training on pictures with captions, as squares or in buckets of aspect ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Sampler

from datamodules.base import ImageDataModule
from datamodules.bucket_stores import BucketPictures, BucketStores, bucket_folder
from datamodules.buckets import BucketBatchSampler, Buckets, bucket_sides
from datamodules.cache import CachedOutputs, Making, as_float
from datamodules.captions import CaptionMix
from datamodules.curated import kept_of
from datamodules.dataset import SerialDataset
from datamodules.encoded import EncodedPictures, UnreadableImage
from datamodules.outputs import Outputs
from datamodules.progress import progress
from datamodules.store import ArrayStore
from repalign.errors import UserError
from repalign.folders import write_atomically


class ImageTextDataModule(ImageDataModule):
    """Batches of pictures with one of their captions, squares or in buckets of aspect ratios.

    Args:
        pictures: makes the source from ``root``, ``image_size``, ``on_corrupt``, ``upscale`` and ``cache_root``: the
            classes of :mod:`datamodules.captioned`.
        root, on_corrupt, upscale: see :class:`datamodules.encoded.EncodedPictures`.
        original: probability of an original caption where there are synthetic ones (SD3: 0.5).
        buckets: cut pictures to the bucket of the nearest aspect ratio; a batch is of one bucket. Latents then lie in a
            store for each bucket.
        bucket_step: sides are multiples of it; a multiple of the autoencoder's downsampling times the patch.
        bucket_ratio: largest aspect ratio of a bucket.
        sizes: batches carry ``size``: original height and width, and height / width of what the picture is cut to.
        cache_features: as in the base, but off unless asked for: text states of a large set fill a disk.
        stream: see :class:`datamodules.base.ImageDataModule`.

    Raises:
        UserError: as the sources.
    """

    def __init__(
        self,
        *,
        pictures: Callable[..., Any],
        root: str | Path | None,
        on_corrupt: str = "stop",
        upscale: bool = False,
        original: float = 1.0,
        buckets: bool = False,
        bucket_step: int = 64,
        bucket_ratio: float = 2.0,
        sizes: bool = False,
        cache_features: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(cache_features=cache_features, **stream)
        self.make_pictures = pictures
        self.root = root
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        self.original = original
        self.sizes = sizes
        self.sides = bucket_sides(self.image_size, bucket_step, bucket_ratio) if buckets else None

    def make_source(self) -> Any:
        """Open the pictures; with buckets their sizes are read from their headers, once."""
        source = self._pictures(self.upscale)
        if self.sides is not None:
            source.buckets = Buckets(sizes_of(source, self.cache_root), self.sides)
        return source

    def _pictures(self, upscale: bool) -> Any:
        found = self.make_pictures(self.root, self.image_size, self.on_corrupt, upscale, cache_root=self.cache_root)
        return kept_of(found, self.keep)

    @cached_property
    def source(self) -> Any:
        """The pictures, with their captions and perhaps their buckets."""
        return self.make_source()

    @cached_property
    def squares(self) -> Any:
        """The pictures as squares, whatever the training cuts them to: what scores compare with."""
        if self.sides is None:
            return self.source
        return self._pictures(upscale=True)

    def images(self, indices: Sequence[int]) -> UInt8[Tensor, "b 3 h w"]:
        """Pictures by index, as squares."""
        return torch.from_numpy(self.squares.load(list(indices))[0])

    def reference_images(self, batch_size: int) -> Iterator[Float[Tensor, "b 3 h w"]]:
        """All pictures in order, as squares, in [0, 1]."""
        for first in range(0, len(self.source), batch_size):
            yield as_float(self.squares.load(list(range(first, min(first + batch_size, len(self.source)))))[0])

    @cached_property
    def mix(self) -> CaptionMix:
        """The choice among a picture's captions."""
        return CaptionMix(self.source, self.original, self.seed)

    @cached_property
    def dataset(self) -> SerialDataset:
        """Batches for keys (serial number, index)."""
        dataset = SerialDataset(self.source, self.seed, self.horizontal_flip)
        dataset.mix = self.mix
        if self.sizes:
            dataset.sizes = self._sizes()
        return dataset

    def _sizes(self) -> np.ndarray:
        ratios = np.ones(len(self.source))
        if self.sides is not None:
            ratios = np.array([height / width for height, width in self.sides])[self.source.buckets.of]
        return np.concatenate([sizes_of(self.source, self.cache_root), ratios[:, None]], 1).astype(np.float32)

    def cached(self, outputs: Outputs, making: Making) -> Sequence[CachedOutputs]:
        """A store for each bucket; of captions one store, with a row for every caption of every picture.

        Raises:
            UserError: for buckets in a folder of one's own, which nothing could be trained from.
        """
        if outputs.of_captions:
            return [CachedOutputs(self.mix.all, outputs, self.cache_root, 1, making, self.verify)]
        if self.sides is None:
            return super().cached(outputs, making)
        if making.folder is not None:
            raise UserError(
                "task.output: stores of buckets are read from the cache alone; leave it out, or set paths.cache=FOLDER"
            )
        sets = [BucketPictures(self.source, number) for number in self._filled]
        return [CachedOutputs(one, outputs, self.cache_root, self.views, making, self.verify) for one in sets]

    def store_for(  # type: ignore[override]  # stores of buckets have the reading half of a store's interface
        self, outputs: Outputs, making: Making
    ) -> ArrayStore | BucketStores:
        """The store of a network's outputs, made when it is not there; of buckets all of them, read as one."""
        if self.sides is None or outputs.of_captions:
            return super().store_for(outputs, making)
        cached = self.cached(outputs, making)
        stores = {number: one.store() for number, one in zip(self._filled, cached, strict=True)}
        folder = self.cache_root / bucket_folder(self.source, self.source.buckets) / cached[0].folder.name
        return BucketStores(self.source.buckets, stores, folder)

    @property
    def _filled(self) -> list[int]:
        """The buckets that have pictures."""
        return np.unique(self.source.buckets.of).tolist()

    def make_sampler(
        self, global_batch: int, rank: int, world: int, accumulate: int, seed: int, start: int
    ) -> Sampler[np.ndarray]:
        """The order of training; with buckets every step is of one."""
        if self.sides is None:
            return super().make_sampler(global_batch, rank, world, accumulate, seed, start)
        assert len(self.dataset), "the pictures are open"
        return BucketBatchSampler(self.source.buckets, global_batch, rank, world, accumulate, seed, start)


def sizes_of(source: EncodedPictures, cache_root: Path) -> np.ndarray:
    """Original height and width of every picture, int32 [N, 2], from the headers; kept in the cache.

    A picture that cannot be read counts as a square where such pictures are skipped.
    """
    file = cache_root / source.fingerprint / "sizes.npy"
    if file.is_file():
        return np.load(file, allow_pickle=False)
    sizes = np.ones((len(source), 2), dtype=np.int32)
    with progress("reading the sizes of pictures", len(source)) as advance:
        for index in range(len(source)):
            try:
                sizes[index] = source.original_sizes([index])[0]
            except UnreadableImage:
                if source.on_corrupt == "stop":
                    raise
            advance(1)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda partial: np.save(partial, sizes))
    return sizes
