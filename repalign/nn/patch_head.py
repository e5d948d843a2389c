"""A second way out of a transformer, beside its token io."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.blocks import Modulation, modulate
from repalign.nn.embed import unpatchify


class PatchHead(nn.Module):
    """Modulated norm, linear layer and unpatchify: grid tokens and their condition to an image [B, C, H, W].

    The layers of DiT's final layer, for predictions that are made before the end (deep supervision).
    """

    def __init__(self, dim: int, channels: int, grid: tuple[int, int], patch: int) -> None:
        super().__init__()
        self.grid = grid
        self.patch = patch
        self.modulation = Modulation(dim, 2)
        self.linear = nn.Linear(dim, patch * patch * channels)

    def forward(self, h: Float[Tensor, "b n d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b c h w"]:
        shift, scale = self.modulation(c)
        return unpatchify(self.linear(modulate(h, shift, scale)), self.grid, self.patch)
