"""Embeddings of position and time."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def sincos_2d(dim: int, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
    """Fixed two-dimensional sine-cosine positions of a row-major grid.

    The first dim/2 channels encode the column, the last dim/2 the row; each half is [sin, cos] of the integer position
    times omega_k = 10000^(-k / (dim/4)), k = 0 .. dim/4 - 1; computed in float64, returned in float32 (DiT, MAE).

    Raises:
        ValueError: when ``dim`` is no multiple of 4.
    """
    return sincos_at(dim, *(torch.arange(side, dtype=torch.float64) for side in grid))


def sincos_at(dim: int, rows: Float[Tensor, " h"], columns: Float[Tensor, " w"]) -> Float[Tensor, "1 n d"]:
    """:func:`sincos_2d` at these positions of rows and columns, whole numbers or not; row-major, N = h w.

    Raises:
        ValueError: when ``dim`` is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, found {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(rows.double(), columns.double(), indexing="ij")

    def encode(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * omega
        return torch.cat([angle.sin(), angle.cos()], 1)

    return torch.cat([encode(columns), encode(rows)], 1).float().unsqueeze(0)


def sinusoid(t: Float[Tensor, "*b"], dim: int, max_period: float = 10000.0) -> Float[Tensor, "*b d"]:
    """[cos(t w_k), sin(t w_k)] with w_k = max_period^(-k / (dim/2)), in float32 (ADM, DiT); ``dim`` is even."""
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float().unsqueeze(-1) * torch.exp(-math.log(max_period) * k / half)
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeEmbedding(nn.Module):
    """:func:`sinusoid` of the time and a two-layer SiLU MLP: [B] -> [B, D].

    The sinusoid is in float32 whatever the precision of the rest. The scale of t is the caller's: SiT feeds [0, 1], DiT
    feeds 0..999; DDT feeds [0, 1] with a max_period of 10.
    """

    def __init__(self, dim: int, frequencies: int = 256, max_period: float = 10000.0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.max_period = max_period
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    @property
    def linears(self) -> list[nn.Linear]:
        """The two linear layers."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]

    def forward(self, t: Float[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        return self.mlp(sinusoid(t, self.frequencies, self.max_period).to(next(self.mlp.parameters()).dtype))


class VectorEmbedding(nn.Module):
    """A two-layer SiLU MLP from a pooled vector to the width: [B, P] -> [B, D]."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.mlp = nn.Sequential(nn.Linear(in_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    @property
    def linears(self) -> list[nn.Linear]:
        """The two linear layers."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]

    def forward(self, x: Float[Tensor, "b p"]) -> Float[Tensor, "b d"]:
        return self.mlp(x)


def unpatchify(tokens: Float[Tensor, "b n ppc"], grid: tuple[int, int], patch: int) -> Float[Tensor, "b c h w"]:
    """Tokens whose channels run (row in patch, column in patch, channel) back to an image."""
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)


def fixed_or_trained(table: Tensor, trained: bool) -> Tensor:
    """A table as a part of a module: a parameter when it is trained, else a buffer."""
    return nn.Parameter(table) if trained else nn.Buffer(table)


def patchify(image: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n ppc"]:
    """The inverse of :func:`unpatchify`: patches row by row, each (row in patch, column in patch, channel)."""
    return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
