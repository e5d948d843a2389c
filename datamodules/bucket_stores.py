"""Stores of pictures of mixed aspect ratios: one for each bucket, read as if they were one."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.buckets import Buckets
from datamodules.channel_statistics import STATISTICS, statistics_of, write_statistics
from datamodules.encoded import EncodedPictures
from datamodules.progress import first_rank
from datamodules.store import ArrayStore
from datamodules.texts import SomeTexts


def bucket_folder(source: EncodedPictures, buckets: Buckets) -> str:
    """Where the stores of these buckets lie below the cache: other sides, or other members, are other stores."""
    digest = hashlib.blake2b(repr(buckets.sides).encode() + buckets.of.tobytes(), digest_size=8).hexdigest()
    return f"{source.fingerprint}/buckets-{digest}"


class BucketPictures:
    """The pictures of one bucket, all of one height and width, as a set of their own.

    Args:
        source: all pictures, whose ``buckets`` are set.
        number: of the bucket.
    """

    has_images = True

    def __init__(self, source: EncodedPictures, number: int) -> None:
        assert source.buckets is not None
        self._source = source
        self.members = source.buckets.members(number)
        self.labels = source.labels[self.members]
        self.captions = None if source.captions is None else SomeTexts(source.captions, self.members)
        self.class_names = source.class_names
        self.image_size = source.image_size
        self.attribution = source.attribution
        self.crop = source.crop
        height, width = source.buckets.sides[number]
        self.fingerprint = f"{bucket_folder(source, source.buckets)}/{height}x{width}"

    def __len__(self) -> int:
        return len(self.members)

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and their places in this bucket; a skipped one is replaced from the bucket."""
        images, found = self._source.load(self.members[indices].tolist())
        return images, np.searchsorted(self.members, found)

    def original_sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Height and width before resizing and cutting, int32 [B, 2]."""
        return self._source.original_sizes(self.members[indices].tolist())


class BucketStores:
    """The stores of all buckets under the numbers of the whole set: the reading half of a store's interface.

    Row i is of picture i, row N + i of picture i mirrored, as in a store of squares. Rows of an array whose shape
    follows the bucket can be asked for one bucket at a time, which is how training asks.

    Args:
        buckets: which picture is in which.
        stores: number of the bucket -> its store; buckets without pictures have none.
        folder: for the statistics of all buckets together.
    """

    def __init__(self, buckets: Buckets, stores: dict[int, ArrayStore], folder: Path) -> None:
        self.folder = folder
        self._buckets = buckets
        self._stores = stores
        first = next(iter(stores.values()))
        self.views: int = first.info["views"]
        self.info: dict[str, Any] = {**first.info, "pictures": len(buckets.of)}
        self.arrays: Collection[str] = first.arrays
        if sums := [part for number in sorted(stores) for _, part in sorted(stores[number].manifest.sums.items())]:
            self.info["statistics"] = statistics_of(sums)
            if first_rank() and not (folder / STATISTICS).is_file():
                folder.mkdir(parents=True, exist_ok=True)
                write_statistics(folder, self.info["statistics"])

    def __len__(self) -> int:
        return self.views * len(self._buckets.of)

    @property
    def mapped(self) -> bool:
        """Whether rows are copied from memory maps."""
        return all(store.mapped for store in self._stores.values())

    def gather(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copies of the rows [B, *row shape], in the order asked.

        Raises:
            ValueError: for rows of several buckets when their shapes differ.
        """
        mirrored, index = np.divmod(np.asarray(rows, dtype=np.int64), len(self._buckets.of))
        numbers = self._buckets.of[index]
        found: np.ndarray | None = None
        for number in np.unique(numbers).tolist():
            here = numbers == number
            members = self._buckets.members(number)
            part = self._stores[number].gather(
                name, np.searchsorted(members, index[here]) + mirrored[here] * len(members)
            )
            if name == "index":  # a bucket counts its own pictures
                part = members[part]
            if here.all():
                return part
            found = np.empty((len(numbers), *part.shape[1:]), part.dtype) if found is None else found
            if part.shape[1:] != found.shape[1:]:
                raise ValueError(f"'{name}': rows of several buckets, {part.shape[1:]} and {found.shape[1:]}")
            found[here] = part
        assert found is not None, "rows were asked for"
        return found
