"""Linear layers that halve or double the side of a token grid."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class TokenDown(nn.Module):
    """Every 2 x 2 tokens joined to one, then a linear layer; the joined vector runs (channel, row, column).

    Args:
        in_dim: width of the tokens.
        out_dim: width after the layer.
        grid: (h, w) before it.

    Raises:
        ValueError: when a side of the grid is odd.
    """

    def __init__(self, in_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        if grid[0] % 2 or grid[1] % 2:
            raise ValueError(f"backbone.patch: a grid of {grid[0]} x {grid[1]} tokens cannot be halved")
        self.grid = grid
        self.proj = nn.Linear(4 * in_dim, out_dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m e"]:
        return self.proj(rearrange(x, "b (h p w q) d -> b (h w) (d p q)", p=2, q=2, h=self.grid[0] // 2))


class TokenUp(nn.Module):
    """The way back: a linear layer, then each token split to 2 x 2; the vector to split runs (channel, row, column).

    Args:
        in_dim: width of the tokens.
        out_dim: width of the tokens after the split.
        grid: (h, w) before the layer.
    """

    def __init__(self, in_dim: int, out_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Linear(in_dim, 4 * out_dim)

    def forward(self, x: Float[Tensor, "b m e"]) -> Float[Tensor, "b n d"]:
        return rearrange(self.proj(x), "b (h w) (d p q) -> b (h p w q) d", p=2, q=2, h=self.grid[0])
