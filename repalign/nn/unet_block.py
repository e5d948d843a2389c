"""One entry of a U-Net: a residual block and the attention that may follow it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.conv_blocks import ResBlock


class UNetBlock(nn.Module):
    """attention(residual(x, c), context); without attention the residual block alone."""

    def __init__(self, residual: ResBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention

    def forward(
        self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"], context: Float[Tensor, "b m k"] | None = None
    ) -> Float[Tensor, "b e h w"]:
        x = self.residual(x, c)
        return x if self.attention is None else self.attention(x, context)
