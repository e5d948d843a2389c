"""Pictures between Pillow, bytes and floats."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def center_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """The centre square of a picture, ADM's way: what ImageNet numbers of diffusion models are measured on.

    Halve both sides by a box filter while the shorter is at least 2 ``size``; resample by a bicubic filter so that the
    shorter side is ``size``, each side round(side * size / shorter); cut the middle, offset (side - size) // 2.

    Source: Dhariwal and Nichol, arXiv:2105.05233, official code; REPA's dataset preparation is the same.

    Args:
        image: RGB, RGBA or grey; the mode is kept. Pillow does not filter pictures with a palette: convert them before.
        size: side of the square in pixels.
    """
    return center_crop_to(image, size, size)


def center_crop_to(image: PIL.Image.Image, height: int, width: int, *, whole: bool = False) -> PIL.Image.Image:
    """:func:`center_crop` to any height and width: the picture covers both, and the middle is cut.

    ``whole`` numbers (a map of classes) are never mixed: the nearest pixel is taken, over the same area.
    """
    box, bicubic = PIL.Image.Resampling.BOX, PIL.Image.Resampling.BICUBIC
    if whole:
        box = bicubic = PIL.Image.Resampling.NEAREST
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), box)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), bicubic)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: PIL.Image.Image) -> UInt8[Tensor, "3 h w"]:
    """A picture as bytes, channels first. Other modes become RGB; what is transparent becomes white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def to_picture(pixels: UInt8[Tensor, "3 h w"]) -> PIL.Image.Image:
    """Bytes, channels first, as a picture."""
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def to_unit(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes as floats in [0, 1]: p / 255."""
    return pixels.float() / 255
