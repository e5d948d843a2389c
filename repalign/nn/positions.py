"""Fixed positions for pictures of several sizes: one table, of which each grid takes the middle."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
from repalign.nn.embed import sincos_at


def position_table(dim: int, side: int, spacing: float = 1.0, origin: float = 0.0) -> Float[Tensor, "1 n d"]:
    """Sine-cosine positions (p - origin) spacing of rows and columns p = 0 .. side - 1, [1, side^2, D].

    SD3 as released: side 192, spacing 1/3 (64 patches of 1024 pixels over 192), origin 0; SD3.5 medium: side 384,
    spacing 1/6. The paper's rule for S x S pixels and tables of ``side`` patches is :func:`paper_positions`.
    """
    at = (torch.arange(side, dtype=torch.float64) - origin) * spacing
    return sincos_at(dim, at, at)


def paper_positions(side: int, pixels: int, patch_pixels: int = 16) -> Float[Tensor, " n"]:
    """Positions ((p - (side - s)/2) 256/S), p = 0 .. side - 1, s = S / 16 (arXiv:2403.03206, section 5.3.2), float64.

    Args:
        side: patches of the longest picture.
        pixels: S, side of a square picture of the same area.
        patch_pixels: pixels of a patch: 16 for an autoencoder of 8 and patches of 2.
    """
    origin, spacing = paper_rule(side, pixels, patch_pixels)
    return (torch.arange(side, dtype=torch.float64) - origin) * spacing


def paper_rule(side: int, pixels: int, patch_pixels: int = 16) -> tuple[float, float]:
    """Origin and spacing of :func:`paper_positions`."""
    return (side - pixels / patch_pixels) / 2, 256 / pixels


def central(table: Float[Tensor, "1 n d"], grid: tuple[int, int]) -> Float[Tensor, "1 m d"]:
    """The middle of a square table, as many rows and columns as the grid has; an odd rest is cut at the end.

    Raises:
        UserError: when the grid is larger than the table.
    """
    side = round(table.shape[1] ** 0.5)
    height, width = grid
    if height > side or width > side:
        raise UserError(
            f"backbone.table_side: the table of {side} x {side} positions is smaller than a picture of "
            f"{height} x {width} patches; set it to {max(grid)} or more"
        )
    if height == width == side:
        return table
    top, left = (side - height) // 2, (side - width) // 2
    square = rearrange(table, "1 (h w) d -> h w d", h=side)
    return rearrange(square[top : top + height, left : left + width], "h w d -> 1 (h w) d")
