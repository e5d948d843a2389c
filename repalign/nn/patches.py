"""Overlapping crops of a feature map and their weighted recombination."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def border_distance(height: int, width: int) -> Float[Tensor, "h w"]:
    """Distance to the nearest border with both sides scaled to 1: 0 at the border, 0.5 in the middle at most."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width)[None, :].expand(height, width)
    return torch.stack([y, x, 1 - y, 1 - x]).amin(0)


@dataclass(frozen=True)
class Crops:
    """Crops of one size on a regular grid, joined by weights that fall towards their borders (LDM's patch-wise mode).

    The weight of a pixel of a crop is its border distance inside the crop, clipped, times the border distance of the
    crop among all crops, clipped too; overlapping crops are averaged by it.

    Attributes:
        size: side of the crops.
        stride: between two crops; the crops must cover the map.
        clip: bounds of the first factor.
        tie_clip: bounds of the second factor; None leaves it out.
    """

    size: int
    stride: int
    clip: tuple[float, float] = (0.01, 0.5)
    tie_clip: tuple[float, float] | None = None

    def count(self, height: int, width: int) -> tuple[int, int]:
        """Crops along both sides.

        Raises:
            ValueError: when the crops do not cover the map.
        """
        for side in (height, width):
            if side < self.size or (side - self.size) % self.stride:
                raise ValueError(f"crops of {self.size} at a stride of {self.stride} do not cover a side of {side}")
        return (height - self.size) // self.stride + 1, (width - self.size) // self.stride + 1

    def cut(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j l"]:
        """All crops, row by row."""
        self.count(*x.shape[2:])
        columns = F.unfold(x, self.size, stride=self.stride)
        return rearrange(columns, "b (c i j) l -> b c i j l", i=self.size, j=self.size)

    def weights(self, height: int, width: int) -> Float[Tensor, "i j l"]:
        """Weight of every pixel of every crop."""
        rows, columns = self.count(height, width)
        inside = border_distance(self.size, self.size).clamp(*self.clip)[..., None]
        among = torch.ones(rows, columns) if self.tie_clip is None else border_distance(rows, columns)
        among = among if self.tie_clip is None else among.clamp(*self.tie_clip)
        return inside * among.reshape(1, 1, -1)

    def total(self, height: int, width: int) -> Float[Tensor, "1 1 h w"]:
        """Sum of the weights over the crops, at every pixel of the map."""
        return self._fold(self.weights(height, width)[None, None], height, width)

    def join(self, crops: Float[Tensor, "b c i j l"], height: int, width: int) -> Float[Tensor, "b c h w"]:
        """The weighted mean of overlapping crops."""
        weights = self.weights(height, width).to(crops)
        return self._fold(crops * weights, height, width) / self.total(height, width).to(crops)

    def _fold(self, crops: Tensor, height: int, width: int) -> Tensor:
        columns = rearrange(crops, "b c i j l -> b (c i j) l")
        return F.fold(columns, (height, width), self.size, stride=self.stride)
