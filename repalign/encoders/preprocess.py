"""From images in [0, 1] to what an encoder was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.encoders.cards import Card
from repalign.errors import UserError

# Pixels of the image per token: an autoencoder that shrinks by 8 and patches of 2, as in SiT and REPA.
PIXELS_PER_TOKEN = 16


class EncoderInput(nn.Module):
    """Normalises by channel and resamples: (x - mean) / std and bicubic, in the encoder's own order.

    The two commute up to rounding; the order is kept so that numbers can be compared closely. The official code of REPA
    (arXiv:2410.06940) normalises first for DINOv2 and I-JEPA and resizes first for CLIP. Pixel centres are aligned, not
    corners; values that overshoot are not clamped; without ``antialias`` the kernel is not widened when it shrinks.
    Images that have the size already are not resampled.

    Args:
        mean: of red, green and blue in [0, 1].
        std: of red, green and blue.
        size: side of the square output in pixels, or its height and width.
        resize_first: resample before normalising.
        antialias: widen the kernel when it shrinks.
    """

    mean: Float[Tensor, "3 1 1"]
    std: Float[Tensor, "3 1 1"]

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | tuple[int, int],
        *,
        resize_first: bool = False,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (size, size) if isinstance(size, int) else size
        self.facts = (tuple(mean), tuple(std), size, resize_first, antialias)
        self.antialias = antialias
        self.steps = (self.resize, self.normalize) if resize_first else (self.normalize, self.resize)
        # Constants of the card, not weights: they stay out of the state dict.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(3, 1, 1), persistent=False)

    @property
    def size(self) -> int:
        """Side of a square output in pixels."""
        height, width = self.shape
        assert height == width, f"an output of {height} x {width} has no side"
        return height

    def normalize(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """(x - mean) / std."""
        return (images - self.mean) / self.std

    def resize(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s t"]:
        """Bicubic to the size."""
        if images.shape[-2:] == self.shape:
            return images
        return F.interpolate(images, size=self.shape, mode="bicubic", align_corners=False, antialias=self.antialias)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s t"]:
        """Images in [0, 1] -> the encoder's input."""
        for step in self.steps:
            images = step(images)
        return images

    def extra_repr(self) -> str:
        """The order and the size, for ``print(encoder)``."""
        order = " then ".join(step.__name__ for step in self.steps)
        return f"{order}, size={self.shape[0]} x {self.shape[1]}, antialias={self.antialias}"


def input_for(card: Card, image_size: int, input_size: int | None = None, patch: int | None = None) -> EncoderInput:
    """The input of a card's encoder: by default patch * image_size / 16 pixels, one token per 16 x 16 of the image.

    Args:
        card: of the encoder.
        image_size: side of the images in pixels.
        input_size: side of what the encoder sees; None for the default.
        patch: the encoder's patch when it is not the card's.

    Raises:
        UserError: naming the side that is no multiple of what it must be.
    """
    patch = card.patch if patch is None else patch
    if input_size is None:
        if image_size < PIXELS_PER_TOKEN or image_size % PIXELS_PER_TOKEN:
            raise UserError(
                f"data.image_size: {image_size} is no multiple of {PIXELS_PER_TOKEN}; mend it, or set "
                "encoders.main.input_size"
            )
        input_size = patch * (image_size // PIXELS_PER_TOKEN)
    if input_size < patch or input_size % patch:
        raise UserError(f"encoders.main.input_size: {input_size} is no multiple of {patch}, the patch of {card.name}")
    return EncoderInput(card.mean, card.std, input_size, resize_first=card.resize_first)
