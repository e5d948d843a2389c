"""What a set of pictures offers to the batch stream, to the cache and to the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class PictureSource(Protocol):
    """Pictures with labels, in a fixed order.

    Attributes:
        image_size: side of the square pictures.
        labels: int64 [N], in [0, len(class_names)).
        class_names: one name per label.
        captions: one text per picture, or None.
        fingerprint: stands for pictures, order and size; also a folder name of the cache.
        attribution: the licence line that must go with the pictures, or None.
        has_images: whether :meth:`load` can give pictures (a store of latents may have none).
    """

    image_size: int
    labels: np.ndarray
    class_names: Sequence[str]
    captions: Sequence[str] | None
    fingerprint: str
    attribution: str | None
    has_images: bool

    def __len__(self) -> int: ...

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and the indices that they really have: a skipped file is replaced by another."""
        ...
