"""What a set of pictures offers to the batch stream, to the cache and to the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
