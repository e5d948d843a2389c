"""Coloured shapes on grounds of several aspect ratios: captioned data for buckets without any file."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image

from datamodules.captions import FirstCaptions, Sets
from datamodules.encoded import NO_CLASS, EncodedPictures
from datamodules.image_text import ImageTextDataModule
from datamodules.synthetic import Shapes

RATIOS = (1.0, 2.5, 1 / 2.5)  # height / width, one after the other


class FramedShapes(EncodedPictures):
    """:class:`datamodules.synthetic.Shapes` in the middle of white grounds, encoded, with their captions.

    Args:
        size: number of pictures.
        image_size: side of the shape's square; the longer side of the ground is 2.5 times as long.
    """

    caption_options = "shapes"

    def __init__(self, size: int, image_size: int) -> None:
        super().__init__(image_size, on_corrupt="stop", upscale=True)
        self._shapes = Shapes(size, image_size)
        self.labels = np.zeros(size, dtype=np.int64)
        self.class_names = NO_CLASS
        self.captions = FirstCaptions(self)

    @property
    def fingerprint(self) -> str:
        """That of the shapes, framed."""
        return f"framed-{self._shapes.fingerprint}"

    def place(self, index: int) -> str:
        """Its number."""
        return f"shape {index}"

    def read(self, index: int) -> bytes:
        """A PNG, drawn now."""
        ratio, side = RATIOS[index % len(RATIOS)], self.image_size
        shape = PIL.Image.fromarray(self._shapes.load([index])[0][0].transpose(1, 2, 0))
        ground = PIL.Image.new("RGB", (round(side * max(1, 1 / ratio)), round(side * max(1, ratio))), "white")
        ground.paste(shape, ((ground.width - side) // 2, (ground.height - side) // 2))
        buffer = io.BytesIO()
        ground.save(buffer, "png")
        return buffer.getvalue()

    def caption_sets(self, index: int) -> Sets:
        """The name of the shape."""
        assert self._shapes.captions is not None, "shapes have names"
        return [self._shapes.captions[index]], []


class SyntheticBucketDataModule(ImageTextDataModule):
    """Batches of :class:`FramedShapes`.

    Args:
        size: number of pictures.
        stream: see :class:`datamodules.image_text.ImageTextDataModule`; there is no root.
    """

    def __init__(self, *, size: int = 1024, **stream: Any) -> None:
        super().__init__(pictures=lambda root, side, *_, **__: FramedShapes(size, side), root=None, **stream)
