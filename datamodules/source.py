"""What a set of pictures offers to the batch stream, to the cache and to the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


class PictureSource(Protocol):
    """Pictures with labels, in a fixed order."""

    @property
    def image_size(self) -> int:
        """Side of the square pictures."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], in [0, len(class_names))."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """One name per label."""
        ...

    @property
    def captions(self) -> Sequence[str] | None:
        """One text per picture, or None."""
        ...

    @property
    def fingerprint(self) -> str:
        """Stands for pictures, order and size; also a folder name of the cache."""
        ...

    @property
    def attribution(self) -> str | None:
        """The licence line that must go with the pictures, or None."""
        ...

    @property
    def has_images(self) -> bool:
        """Whether :meth:`load` can give pictures; a folder of latents cannot."""
        ...

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and the indices that they really have: a skipped file is replaced by another."""
        ...


@runtime_checkable
class Boxed(Protocol):
    """A set of pictures whose objects have boxes."""

    def boxes(self, indices: Sequence[int]) -> np.ndarray:
        """Class, x_0, y_0, x_1, y_1 of every object, float32 [B, M, 5].

        Coordinates are in [0, 1] of the square picture; -1 where there is no object.
        """
        ...


@runtime_checkable
class Segmented(Protocol):
    """A set of pictures with a class for every pixel."""

    def segmentation(self, indices: Sequence[int]) -> np.ndarray:
        """Class of every pixel, int64 [B, H, W]; -1 where it has none."""
        ...


@runtime_checkable
class Cropped(Protocol):
    """A set of pictures that are cut from larger ones."""

    @property
    def crop(self) -> str:
        """How: kept in the header of every store, because latents of another crop are other latents."""
        ...

    def original_sizes(self, indices: Sequence[int]) -> np.ndarray:
        """Height and width before resizing and cutting, int32 [B, 2]."""
        ...


@runtime_checkable
class Named(Protocol):
    """A set whose pictures have names of their own, which do not depend on the others or on where the set lies."""

    def name(self, index: int) -> str:
        """The name of a picture."""
        ...
