"""ImageNet, or any folder of pictures."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.base import ImageDataModule
from datamodules.encoded import EncodedPictures, check_classes, existing_root
from repalign.errors import UserError

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
LABELS = "dataset.json"


class ImageFolder(EncodedPictures):
    """Pictures in one folder per class, or listed with their labels in ``dataset.json``.

    Classes are the sub-folders in alphabetical order (ImageNet: the WordNet ids), pictures the files below them with a
    known suffix, in alphabetical order. A ``dataset.json`` of the form {"labels": [["a/b.png", 3], ...]} in the root
    takes precedence; it is what the data preparation of EDM, StyleGAN and REPA writes.

    Args:
        root: the folder; ImageNet: the one with n01440764, n01443537, ...
        image_size, on_corrupt, upscale: see :class:`datamodules.encoded.EncodedPictures`.
        num_classes: when given, the number of classes that must be found.

    Raises:
        UserError: for a missing or empty folder, a wrong number of classes, bad labels; later for a file that cannot be
            read or is too small.
    """

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(image_size, on_corrupt, upscale)
        self.root = existing_root(root)
        listed = (self.root / LABELS).is_file()
        self.files, labels, self.class_names = _listed(self.root) if listed else files_by_class(self.root)
        self.labels = np.array(labels, dtype=np.int64)
        check_classes(len(self.class_names), num_classes, root)
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names, sizes and labels of all files."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=8)
            for name, label in zip(self.files, self.labels, strict=True):
                digest.update(f"{name}\0{os.stat(self.root / name).st_size}\0{label}\n".encode())
            self._fingerprint = f"{self.root.resolve().name}-{self.image_size}px-{digest.hexdigest()}"
        return self._fingerprint

    def place(self, index: int) -> str:
        """The path of a picture, quoted."""
        return f"'{self.root / self.files[index]}'"

    def read(self, index: int) -> bytes:
        """The bytes of a file."""
        return (self.root / self.files[index]).read_bytes()


def files_by_class(root: Path, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[str], list[int], list[str]]:
    """Files below one folder per class: relative names, labels, and the classes in alphabetical order.

    Raises:
        UserError: when there is no folder, or one without a file of these suffixes.
    """
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = [
            os.path.relpath(os.path.join(folder, file), root)
            for folder, _, inside in os.walk(root / name)
            for file in inside
            if file.lower().endswith(suffixes)
        ]
        if not found:
            raise UserError(f"data.root: class folder '{root / name}' has no picture ({', '.join(suffixes)})")
        files += sorted(found)
        labels += [label] * len(found)
    if not files:
        raise UserError(
            f"data.root: '{root}' has neither a folder per class nor a {LABELS}; expected "
            f"{root.name}/CLASS/PICTURE.png or {root.name}/{LABELS}"
        )
    return files, labels, class_names


def _listed(root: Path) -> tuple[list[str], list[int], list[str]]:
    path = root / LABELS
    try:
        pairs = [(str(name), int(label)) for name, label in json.loads(path.read_bytes())["labels"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'data.root: \'{path}\' is not of the form {{"labels": [["a.png", 0], ...]}} ({error})'
        ) from error
    if not pairs:
        raise UserError(f"data.root: '{path}' lists no picture")
    for name, label in pairs:
        if label < 0:
            raise UserError(f"data.root: '{path}' gives label {label} to '{name}', expected 0 or more")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"data.root: '{path}' lists '{name}', expected a file below '{root}'")
    files, labels = (list(column) for column in zip(*sorted(pairs), strict=True))
    return files, labels, [str(label) for label in range(max(labels) + 1)]


class ImageFolderDataModule(ImageDataModule):
    """Batches of :class:`ImageFolder`; the options are those of both.

    Args:
        root, on_corrupt, upscale, num_classes: see :class:`ImageFolder`.
        cache_features: as in the base, but off unless asked for: features of a large set fill a disk.
        stream: see :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        on_corrupt: str = "stop",
        upscale: bool = False,
        num_classes: int | None = None,
        cache_features: bool = False,
        **stream: Any,
    ) -> None:
        super().__init__(cache_features=cache_features, **stream)
        self.root = root
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        self.expected_classes = num_classes

    def make_source(self) -> ImageFolder:
        """List the pictures."""
        return ImageFolder(self.root, self.image_size, self.on_corrupt, self.upscale, self.expected_classes)
