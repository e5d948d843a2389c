"""Rotary position embedding of a grid (arXiv:2104.09864, in two dimensions)."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.precision import at_least_float32


def rotary_angles(
    head_dim: int, grid: tuple[int, int], theta: float = 10000.0, extent: float = 16.0
) -> Float[Tensor, "n half"]:
    """Angles position * theta^(-4k / head_dim), k = 0 .. head_dim/4 - 1, of a row-major grid; float32.

    Positions run from 0 to ``extent`` on either axis whatever the grid, so a larger picture interpolates. The columns
    are ordered x k=0, y k=0, x k=1, y k=1, ...; x counts columns of the grid, y its rows (DDT).

    Raises:
        ValueError: when the width of a head is no multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need heads whose width is a multiple of 4, found {head_dim}")
    omega = 1 / theta ** (4 * torch.arange(head_dim // 4, dtype=torch.float32) / head_dim)
    y, x = torch.meshgrid(*(torch.linspace(0, extent, n) for n in grid), indexing="ij")
    position = torch.stack([x.flatten(), y.flatten()], dim=-1)
    return rearrange(position.unsqueeze(1) * omega.unsqueeze(1), "n k xy -> n (k xy)")


class Rotary2d(nn.Module):
    """Turns each pair of neighbouring channels (2m, 2m+1) by the m-th angle of its token; in float32.

    (a, b) -> (a cos - b sin, a sin + b cos), for queries and keys [B, heads, N, head_dim]. Nothing of it is a weight.

    Args:
        head_dim, grid, theta, extent: see :func:`rotary_angles`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, grid: tuple[int, int], theta: float = 10000.0, extent: float = 16.0) -> None:
        super().__init__()
        angles = rotary_angles(head_dim, grid, theta, extent)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
        pairs = at_least_float32(x).unflatten(-1, (-1, 2))
        cos, sin = at_least_float32(self.cos), at_least_float32(self.sin)
        if torch.compiler.is_compiling():  # a compiler fuses real arithmetic and has no kernels for complex numbers
            a, b = pairs.unbind(-1)
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
        else:  # one product that keeps the strides: about a tenth of the time
            turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
        return turned.flatten(-2).to(x.dtype)
