"""Encoded pictures (JPEG, PNG, WebP), wherever they lie: decoding, cropping, skipping of damaged ones."""

from __future__ import annotations

import hashlib
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from datamodules.buckets import Buckets
from datamodules.images import center_crop_to, to_picture, to_pixels
from datamodules.pictures import DECODING, open_picture
from repalign.errors import UserError, unknown_choice

ON_CORRUPT = ("stop", "skip")
NO_CLASS = ("all",)  # the one class of pictures without labels: label 0

_log = logging.getLogger(__name__)


class EncodedPictures(ABC):
    """The part of a picture source that does not depend on where the bytes are.

    A picture becomes RGB, then the centre square by ADM's crop (:func:`datamodules.images.center_crop`). A subclass
    lists its pictures, sets ``labels`` and ``class_names``, and says how to read one.

    Args:
        image_size: side of the squares.
        on_corrupt: 'stop' raises at a picture that cannot be read; 'skip' names it in the log, with the number so far,
            and takes the next readable picture in its place, label included.
        upscale: allow pictures smaller than ``image_size``.

    Raises:
        UserError: for an unknown policy; later for a picture that cannot be read or is too small.
    """

    crop = "adm"  # latents of another crop are other latents
    attribution: str | None = None
    has_images = True
    captions: Sequence[str] | None = None
    labels: np.ndarray
    class_names: Sequence[str]

    def __init__(self, image_size: int, on_corrupt: str, upscale: bool) -> None:
        if on_corrupt not in ON_CORRUPT:
            raise unknown_choice("data.on_corrupt", on_corrupt, ON_CORRUPT)
        self.image_size = image_size
        self.on_corrupt = on_corrupt
        self.upscale = upscale
        self.buckets: Buckets | None = None  # of mixed aspect ratios; None: every picture becomes a square
        self._skipped: set[int] = set()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Stands for pictures, order and size; also a folder name of the cache."""

    @abstractmethod
    def place(self, index: int) -> str:
        """Where a picture lies, for messages."""

    def name(self, index: int) -> str:
        """The place of a picture below the folder of the set: its name wherever that folder lies."""
        root = getattr(self, "root", None)
        return self.place(index).replace("" if root is None else f"{root}/", "", 1).replace("'", "")

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded picture.

        Raises:
            OSError: when it cannot be read.
        """

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and their indices; a skipped picture is replaced by the next readable one."""
        images, found = zip(*(self._readable(index) for index in indices), strict=True)
        return np.stack(images), np.array(found, dtype=np.int64)

    def original_sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Height and width before resizing and cutting, int32 [B, 2], from the headers; nothing is decoded.

        Raises:
            UnreadableImage: for a picture that cannot be read, whatever the policy: ask for indices that
                :meth:`load` returned.
        """
        sizes = [self._open(index).size[::-1] for index in indices]
        return np.array(sizes, dtype=np.int32).reshape(-1, 2)

    def _readable(self, index: int) -> tuple[np.ndarray, int]:
        others = len(self) if self.buckets is None else len(self.buckets.members(int(self.buckets.of[index])))
        for offset in range(others):
            # What takes its place has the same shape.
            candidate = (index + offset) % len(self) if self.buckets is None else self.buckets.after(index, offset)
            try:
                return self._picture(candidate), candidate
            except UnreadableImage as error:
                if self.on_corrupt == "stop":
                    raise
                self._note(candidate, error)
        raise UserError(f"data.root: none of the {others} pictures can be read, among them {self.place(index)}")

    def _open(self, index: int) -> PIL.Image.Image:
        try:
            return open_picture(io.BytesIO(self.read(index)))
        except DECODING as error:
            raise self._unreadable(index, error) from error

    def whole(self, index: int) -> np.ndarray:
        """A picture as it is, neither cut nor resampled, uint8 [3, H, W].

        Raises:
            UnreadableImage: for a picture that cannot be read, whatever the policy.
        """
        return to_pixels(self._decoded(index)).numpy()

    def _decoded(self, index: int) -> PIL.Image.Image:
        image = self._open(index)
        try:
            image.load()
            return image if image.mode == "RGB" else to_picture(to_pixels(image))
        except DECODING as error:
            raise self._unreadable(index, error) from error

    def _picture(self, index: int) -> np.ndarray:
        picture = self._decoded(index)
        height, width = (self.image_size,) * 2 if self.buckets is None else self.buckets.sides_of(index)
        if (picture.width < width or picture.height < height) and not self.upscale:
            raise UserError(
                f"data.image_size: {self.place(index)} has {picture.width}x{picture.height} pixels, expected at least "
                f"{width}x{height}; set data.upscale=true to enlarge such pictures"
            )
        return to_pixels(center_crop_to(picture, height, width)).numpy()

    def _unreadable(self, index: int, error: Exception) -> UnreadableImage:
        return UnreadableImage(
            f"data.root: cannot read {self.place(index)} ({error}); restore the file, or set data.on_corrupt=skip to "
            "go on without it"
        )

    def _note(self, index: int, error: Exception) -> None:
        if index not in self._skipped:
            self._skipped.add(index)
            _log.warning("skipped (%d so far of %d): %s", len(self._skipped), len(self), error)


class UnreadableImage(UserError):
    """A file that is no picture, or a torn one."""


def existing_root(root: str | Path | None) -> Path:
    """The folder of the pictures.

    Raises:
        UserError: when it has no value or is not there.
    """
    mend = (
        "set data.root=FOLDER, or the environment variable that the recipe reads (REPALIGN_IMAGENET for "
        "data=imagenet, REPALIGN_CC12M for data=cc12m, REPALIGN_IMAGES for other pictures)"
    )
    if root is None:
        raise UserError(f"data.root: has no value; {mend}")
    if not Path(root).expanduser().is_dir():
        raise UserError(f"data.root: no folder '{root}'; {mend}")
    return Path(root).expanduser()


def shards_in(root: Path, pattern: str) -> list[Path]:
    """Files below a folder by a pattern, in alphabetical order.

    Raises:
        UserError: when there is none; the line says what there is.
    """
    found = sorted(path for path in root.glob(pattern) if path.is_file())
    if not found:
        others = sorted(path.name for path in root.iterdir())
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "") or "nothing"
        raise UserError(f"data.files: nothing in '{root}' matches '{pattern}'; it holds {shown}")
    return found


def digest_of(root: Path, shards: Sequence[Path], image_size: int, *options: object) -> str:
    """A fingerprint: folder name, size, and a hash over names and sizes of the shards and over options of reading."""
    digest = hashlib.blake2b(digest_size=8)
    for path in shards:
        digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\n".encode())
    digest.update(repr(options).encode())
    return f"{root.resolve().name}-{image_size}px-{digest.hexdigest()}"


def labels_of(values: Sequence[int] | np.ndarray, key: str, classes: int | None = None) -> np.ndarray:
    """Labels as int64 [N], checked.

    Args:
        values: one integer per picture.
        key: where they come from, for messages.
        classes: labels must be below this number; None for no upper bound.

    Raises:
        UserError: when a label is negative (hidden labels of a test part) or too large.
    """
    labels = np.asarray(values, dtype=np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= (2**31 if classes is None else classes)))
    if len(wrong):
        expected = "0 or more" if classes is None else f"0 to {classes - 1}"
        raise UserError(f"{key}: label {labels[wrong[0]]} of picture {wrong[0]}, expected {expected}")
    return labels


def check_classes(found: int, expected: int | None, root: object) -> None:
    """Refuse another number of classes than the configuration names.

    Raises:
        UserError: with both numbers.
    """
    if expected is not None and expected != found:
        raise UserError(f"data.root: found {found} classes in '{root}', expected data.num_classes={expected}")
