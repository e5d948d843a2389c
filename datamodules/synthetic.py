"""Coloured shapes drawn on demand: data without any file, for tests and first steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from datamodules.base import ImageDataModule
from repalign.errors import UserError
from repalign.random import SampleRandom

# Signed distance (negative inside) of the unit shape at (x, y).
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES: dict[str, Distance] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "diamond": lambda x, y: np.abs(x) + np.abs(y) - 1,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.25,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
}


class Shapes:
    """One shape per picture, of random place, size and colour on a random ground; class = shape.

    Picture i is a pure function of (seed, i, image_size); labels go round: i modulo the number of shapes.

    Args:
        size: number of pictures.
        image_size: side of the pictures.
        seed: of the pictures.

    Raises:
        UserError: when ``size`` is smaller than the number of shapes.
    """

    attribution = None
    has_images = True

    def __init__(self, size: int, image_size: int, seed: int = 0) -> None:
        if size < len(SHAPES):
            raise UserError(f"data.size: expected {len(SHAPES)} or more (one picture per shape), found {size}")
        self.image_size = image_size
        self.seed = seed
        self.class_names: Sequence[str] = list(SHAPES)
        self.labels = np.arange(size, dtype=np.int64) % len(SHAPES)
        self.captions: Sequence[str] | None = [f"a {self.class_names[label]}" for label in self.labels]
        self.fingerprint = f"shapes-{image_size}px-{size}-{seed}"

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [B, 3, H, W] and their indices."""
        random = SampleRandom(self.seed, indices)
        numbers = np.stack([random.uniform(f"shapes/{i}").numpy() for i in range(9)], axis=1)
        images = [self._draw(self.labels[i], row) for i, row in zip(indices, numbers, strict=True)]
        return np.stack(images), np.asarray(indices, dtype=np.int64)

    def boxes(self, indices: Sequence[int]) -> np.ndarray:
        """The square around each shape, [B, 1, 5]: class, x_0, y_0, x_1, y_1."""
        random = SampleRandom(self.seed, indices)
        numbers = np.stack([random.uniform(f"shapes/{i}").numpy() for i in range(3)], axis=1)
        rows = []
        for index, row in zip(indices, numbers, strict=True):
            radius, (y, x) = self._place(row)
            corners = np.array([x - radius, y - radius, x + radius, y + radius]) / self.image_size
            rows.append([[self.labels[index], *corners]])
        return np.array(rows, dtype=np.float32)

    def segmentation(self, indices: Sequence[int]) -> np.ndarray:
        """The shape's class inside it, the number of shapes on the ground, [B, H, W]."""
        random = SampleRandom(self.seed, indices)
        numbers = np.stack([random.uniform(f"shapes/{i}").numpy() for i in range(3)], axis=1)
        maps = []
        for index, row in zip(indices, numbers, strict=True):
            label = int(self.labels[index])
            maps.append(np.where(self._inside(label, row) >= 0.5, label, len(SHAPES)))
        return np.array(maps, dtype=np.int64)

    def _place(self, numbers: np.ndarray) -> tuple[float, np.ndarray]:
        """Radius and centre (row, column) in pixels."""
        radius = self.image_size * (0.15 + 0.2 * numbers[0])
        return radius, radius + (self.image_size - 2 * radius) * numbers[1:3]

    def _inside(self, label: int, numbers: np.ndarray) -> np.ndarray:
        """How much of every pixel is the shape, [H, W]."""
        radius, center = self._place(numbers)
        pixel = np.arange(self.image_size) + 0.5
        y, x = np.meshgrid((pixel - center[0]) / radius, (pixel - center[1]) / radius, indexing="ij")
        return np.clip(0.5 - SHAPES[self.class_names[label]](x, y) * radius, 0, 1)  # one pixel of soft edge

    def _draw(self, label: int, numbers: np.ndarray) -> np.ndarray:
        inside = self._inside(label, numbers)
        colour, ground = 0.6 * numbers[3:6], 0.6 + 0.4 * numbers[6:9]
        picture = ground[:, None, None] * (1 - inside) + colour[:, None, None] * inside
        return np.round(picture * 255).astype(np.uint8)


class SyntheticDataModule(ImageDataModule):
    """Batches of :class:`Shapes`; the options are those of both.

    Args:
        size: see :class:`Shapes`; the pictures do not change with ``seed``, their order does.
        image_size: side of the square pictures.
        stream: see :class:`datamodules.base.ImageDataModule`.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        size: int = 1024,
        **stream: Any,
    ) -> None:
        super().__init__(image_size=image_size, **stream)
        self.size = size

    def make_source(self) -> Shapes:
        """Pictures that are drawn when they are read."""
        return Shapes(self.size, self.image_size)
