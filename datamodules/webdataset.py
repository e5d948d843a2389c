"""Pictures in tar shards, as the library webdataset writes them: ImageNet and CC12M are often kept so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.encoded import (
    NO_CLASS,
    EncodedPictures,
    check_classes,
    digest_of,
    existing_root,
    labels_of,
    shards_in,
)
from datamodules.progress import first_rank
from datamodules.tar_index import PICTURES, TarIndex, index_of, read_at
from datamodules.texts import LazyTexts
from repalign.errors import UserError


class TarPictures(EncodedPictures):
    """Encoded pictures in tar shards, readable in any order because their places are indexed once.

    A sample is what :func:`datamodules.tar_index.index_of` says. Nothing is unpacked to the disk. When no sample has a
    label, all are of one class with label 0; when no sample has a caption, there are none.

    Args:
        root: folder of the shards.
        image_size, on_corrupt, upscale: see :class:`datamodules.encoded.EncodedPictures`.
        cache_root: where the index is kept.
        files: which files below ``root``, such as 'cc12m-train-*.tar'.
        num_classes: when given, the number of classes that must be found.

    Raises:
        UserError: for missing, torn or compressed shards, and when only some samples have a label or a caption.
    """

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        cache_root: str | Path = "cache",
        files: str = "**/*.tar",
        num_classes: int | None = None,
    ) -> None:
        super().__init__(image_size, on_corrupt, upscale)
        self.root = existing_root(root)
        self.shards = shards_in(self.root, files)
        self._index = index_of(self.shards, Path(cache_root).expanduser())
        if not len(self._index.label):
            raise UserError(
                f"data.root: the {len(self.shards)} shards in '{root}' have no picture (.{', .'.join(PICTURES)})"
            )
        if self._index.without_picture and first_rank():
            print(f"data.root: {self._index.without_picture} samples in '{root}' have no picture: left out", flush=True)
        labelled = self._all_or_none(self._index.label >= 0, "label (.cls, or 'label' in .json)")
        self.labels = labels_of(self._index.label if labelled else np.zeros_like(self._index.label), "data.root")
        self.class_names = [str(label) for label in range(int(self.labels.max()) + 1)] if labelled else NO_CLASS
        check_classes(len(self.class_names), num_classes, root)
        captioned = self._all_or_none(self._index.text[:, 1] >= 0, "caption (.txt, or 'caption' in .json)")
        self.captions = TarTexts(self.shards, self._index) if captioned else None
        self._fingerprint = digest_of(self.root, self.shards, image_size)

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names and sizes of the shards."""
        return self._fingerprint

    def place(self, index: int) -> str:
        """Shard and offset."""
        offset, size = self._index.picture[index]
        return f"'{self.shards[self._index.shard[index]]}' ({size} bytes at offset {offset})"

    def read(self, index: int) -> bytes:
        """The bytes of a picture."""
        return read_at(self.shards[self._index.shard[index]], *self._index.picture[index].tolist())

    def _all_or_none(self, held: np.ndarray, what: str) -> bool:
        if held.any() and not held.all():
            raise UserError(
                f"data.root: {int(held.sum())} of {len(held)} samples in '{self.root}' have a {what}, not the one in "
                f"{self.place(int(np.argmin(held)))}; expected all or none of them, choose the shards by data.files"
            )
        return bool(held.all())


class TarTexts(LazyTexts):
    """Captions, read from their shards when they are asked for.

    Args:
        shards: the files.
        index: of their samples, all of which have a caption.
    """

    def __init__(self, shards: Sequence[Path], index: TarIndex) -> None:
        self._shards = shards
        self._index = index

    def __len__(self) -> int:
        return len(self._index.text)

    def text(self, index: int) -> str:
        """One of them."""
        content = read_at(self._shards[self._index.shard[index]], *self._index.text[index].tolist())
        text = json.loads(content)["caption"] if self._index.is_json[index] else content.decode(errors="replace")
        return text.strip()


class WebDatasetDataModule(ImageDataModule):
    """Batches of :class:`TarPictures`; the options are those of both.

    Args:
        root, on_corrupt, upscale, files, num_classes: see :class:`TarPictures`.
        cache_features: as in the base, but off unless asked for: features of a large set fill a disk.
        stream: see :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        on_corrupt: str = "stop",
        upscale: bool = False,
        files: str = "**/*.tar",
        num_classes: int | None = None,
        cache_features: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(cache_features=cache_features, **stream)
        self.root = root
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        self.files = files
        self.expected_classes = num_classes

    def make_source(self) -> TarPictures:
        """Index the shards, or open their index."""
        return TarPictures(
            self.root,
            self.image_size,
            self.on_corrupt,
            self.upscale,
            self.cache_root,
            self.files,
            self.expected_classes,
        )
