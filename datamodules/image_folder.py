"""ImageNet, or any folder of pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from datamodules.base import ImageDataModule
from datamodules.images import center_crop, to_picture, to_pixels
from datamodules.store import Verify
from repalign.errors import UserError, unknown_choice

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
ON_CORRUPT = ("stop", "skip")
LABELS = "dataset.json"

_log = logging.getLogger(__name__)


class ImageFolder:
    """Pictures in one folder per class, or listed with their labels in ``dataset.json``.

    Classes are the sub-folders in alphabetical order (ImageNet: the WordNet ids), pictures the files below them with a
    known suffix, in alphabetical order. A ``dataset.json`` of the form {"labels": [["a/b.png", 3], ...]} in the root
    takes precedence; it is what the data preparation of EDM, StyleGAN and REPA writes.

    A picture becomes RGB, then the centre square by ADM's crop (:func:`datamodules.images.center_crop`).

    Args:
        root: the folder; ImageNet: the one with n01440764, n01443537, ...
        image_size: side of the squares.
        on_corrupt: 'stop' raises at a file that cannot be read; 'skip' names it in the log, with the number so far,
            and takes the next readable picture in its place, label included.
        upscale: allow pictures smaller than ``image_size``.
        num_classes: when given, the number of classes that must be found.

    Raises:
        UserError: for a missing or empty folder, a wrong number of classes, bad labels; later for a file that cannot be
            read or is too small.
    """

    captions = None
    attribution = None
    has_images = True
    crop = "centre square, ADM"

    def __init__(
        self,
        root: str | Path | None,
        image_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        num_classes: int | None = None,
    ) -> None:
        mend = (
            "set data.root=FOLDER, or the environment variable that the recipe reads (REPALIGN_IMAGENET for "
            "data=imagenet, REPALIGN_IMAGES for data=image_folder)"
        )
        if root is None:
            raise UserError(f"data.root: has no value; {mend}")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data.root: no folder '{root}'; {mend}")
        if on_corrupt not in ON_CORRUPT:
            raise unknown_choice("data.on_corrupt", on_corrupt, ON_CORRUPT)
        self.image_size = image_size
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        listed = (self.root / LABELS).is_file()
        self.files, labels, self.class_names = _listed(self.root) if listed else _by_folder(self.root)
        self.labels = np.array(labels, dtype=np.int64)
        if num_classes is not None and num_classes != len(self.class_names):
            raise UserError(
                f"data.root: found {len(self.class_names)} classes in '{root}', expected data.num_classes={num_classes}"
            )
        self._skipped: set[int] = set()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """Folder name, size, and a hash over names, sizes and labels of all files."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=8)
            for name, label in zip(self.files, self.labels, strict=True):
                digest.update(f"{name}\0{os.stat(self.root / name).st_size}\0{label}\n".encode())
            self._fingerprint = f"{self.root.resolve().name}-{self.image_size}px-{digest.hexdigest()}"
        return self._fingerprint

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and their indices; a skipped file is replaced by the next readable one."""
        images, found = zip(*(self._readable(index) for index in indices), strict=True)
        return np.stack(images), np.array(found, dtype=np.int64)

    def original_sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Height and width of the files, int32 [B, 2]; only their headers are read."""
        sizes = []
        for index in indices:
            with PIL.Image.open(self.root / self.files[index]) as image:
                sizes.append((image.height, image.width))
        return np.array(sizes, dtype=np.int32)

    def _readable(self, index: int) -> tuple[np.ndarray, int]:
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                return self._read(self.root / self.files[candidate]), candidate
            except UnreadableImage as error:
                if self.on_corrupt == "stop":
                    raise
                self._note(candidate, error)
        raise UserError(f"data.root: none of the {len(self)} pictures in '{self.root}' can be read")

    def _read(self, path: Path) -> np.ndarray:
        try:
            with PIL.Image.open(path) as image:
                image.load()
                picture = image if image.mode == "RGB" else to_picture(to_pixels(image))
        # Pillow's decoders raise SyntaxError and ValueError too for torn files.
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(
                f"data.root: cannot read '{path}' ({error}); restore the file, or set data.on_corrupt=skip to go on "
                "without it"
            ) from error
        if min(picture.size) < self.image_size and not self.upscale:
            raise UserError(
                f"data.image_size: '{path}' has {picture.width}x{picture.height} pixels, expected at least "
                f"{self.image_size}x{self.image_size}; set data.upscale=true to enlarge such pictures"
            )
        return to_pixels(center_crop(picture, self.image_size)).numpy()

    def _note(self, index: int, error: Exception) -> None:
        if index not in self._skipped:
            self._skipped.add(index)
            _log.warning("skipped (%d so far of %d): %s", len(self._skipped), len(self), error)


class UnreadableImage(UserError):
    """A file that is no picture, or a torn one."""


def _by_folder(root: Path) -> tuple[list[str], list[int], list[str]]:
    class_names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        found = [
            os.path.relpath(os.path.join(folder, file), root)
            for folder, _, inside in os.walk(root / name)
            for file in inside
            if file.lower().endswith(SUFFIXES)
        ]
        if not found:
            raise UserError(f"data.root: class folder '{root / name}' has no picture ({', '.join(SUFFIXES)})")
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
    except (ValueError, KeyError, TypeError) as error:
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
        image_size, batch_size, accumulate, num_workers, seed, horizontal_flip, cache_root, cache_latents,
            cache_features, latent_dtype, feature_dtype, keep_images, verify: see
            :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None,
        image_size: int,
        batch_size: int,
        on_corrupt: str = "stop",
        upscale: bool = False,
        num_classes: int | None = None,
        accumulate: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        horizontal_flip: bool = False,
        cache_root: str | Path = "cache",
        cache_latents: bool = True,
        cache_features: bool = False,
        latent_dtype: str = "float32",
        feature_dtype: str = "float16",
        keep_images: bool = False,
        verify: Verify = "hash",
    ) -> None:
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            accumulate=accumulate,
            num_workers=num_workers,
            seed=seed,
            horizontal_flip=horizontal_flip,
            cache_root=cache_root,
            cache_latents=cache_latents,
            cache_features=cache_features,
            latent_dtype=latent_dtype,
            feature_dtype=feature_dtype,
            keep_images=keep_images,
            verify=verify,
        )
        self.root = root
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        self.expected_classes = num_classes

    def make_source(self) -> ImageFolder:
        """List the pictures."""
        return ImageFolder(self.root, self.image_size, self.on_corrupt, self.upscale, self.expected_classes)
