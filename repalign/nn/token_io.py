"""How the streams of a state become tokens and return (protocol ``TokenIO``)."""

from __future__ import annotations

from collections.abc import Mapping

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.nn.embed import sincos_2d, unpatchify
from repalign.nn.init import xavier_patchify_, zero_
from repalign.state import StateShape


class PatchEmbed(nn.Conv2d):
    """Patches of p x p as tokens: one linear layer over each, row-major.

    Raises:
        ValueError: when the patch does not divide the latent.
    """

    def __init__(self, latent_shape: tuple[int, int, int], patch: int, dim: int) -> None:
        channels, height, width = latent_shape
        if height % patch or width % patch:
            raise ValueError(f"backbone.patch: {patch} does not divide the latent of {height} x {width}")
        super().__init__(channels, dim, patch, stride=patch)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        # Elementwise operations keep strides: laid out as maps, the residual stream would be copied by every
        # linear layer.
        return rearrange(super().forward(input), "b d h w -> b (h w) d").contiguous()


class PatchIO(nn.Module):
    """One image-like stream [B, C, H, W], cut into patches of p x p; no prefix tokens.

    The output linear gives p * p * C values a token, or twice as many with a variance head: then the first C channels
    are the prediction and the last C the head ``variance`` (DiT's learned range).

    Raises:
        UserError: for a state of several streams.
        ValueError: when the patch does not divide the latent.
    """

    prefix = 0

    def __init__(self, latent_shape: StateShape, patch: int, dim: int, variance_head: bool = False) -> None:
        super().__init__()
        if isinstance(latent_shape, Mapping):
            raise UserError(
                f"token_io: patches take one stream, found {', '.join(latent_shape)}; set token_io=patch_and_class "
                "(a vector beside the latent) or token_io=channels (maps beside the latent)"
            )
        channels, height, width = latent_shape
        self.patchify = PatchEmbed((channels, height, width), patch, dim)
        self.patch = patch
        self.channels = channels
        self.grid = (height // patch, width // patch)
        self.variance_head = variance_head
        self.linear = nn.Linear(dim, patch * patch * channels * (2 if variance_head else 1))
        self.dim = dim

    def positions(self) -> Float[Tensor, "1 n d"]:
        """Sine-cosine positions of the patches."""
        return sincos_2d(self.dim, self.grid)

    def reset_parameters(self) -> None:
        """DiT's initial weights: xavier on the patches as one matrix, zero output."""
        xavier_patchify_(self.patchify)
        zero_(self.linear)

    def embed(self, x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patches to tokens, row-major."""
        return self.patchify(x_t)

    def unembed(self, tokens: Float[Tensor, "b n d"]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Tokens to the prediction and the heads, each [B, C, H, W]."""
        image = unpatchify(self.linear(tokens), self.grid, self.patch)
        if not self.variance_head:
            return image, {}
        pred, variance = image.chunk(2, dim=1)
        return pred, {"variance": variance}
