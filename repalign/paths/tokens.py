"""A path whose tokens have times of their own."""

from __future__ import annotations

from einops import repeat
from jaxtyping import Float
from torch import Tensor

from repalign.paths.interpolant import Interpolant
from repalign.state import Coefficients, PathSample, State, leading


class TokenPath(Interpolant):
    """Another path with a time for each patch of p x p: x_t mixes data and noise patch by patch.

    The coefficients of a sample are images [B, 1, H, W] that are constant on patches; its time stays [B, N], row-major,
    as the backbone wants it. A patch embedding sees one patch at a time, so mixing pixels is mixing embedded tokens.

    Args:
        path: whose coefficients are taken.
        patch: patch size p of the backbone.
    """

    def __init__(self, path: Interpolant, patch: int) -> None:
        self.path = path
        self.patch = patch

    def coefficients(self, t: Float[Tensor, "*b"]) -> Coefficients:
        """Those of the path, at times of any shape."""
        return self.path.coefficients(t)

    def sample(self, x_0: State, eps: State, t: Float[Tensor, "b n"]) -> PathSample:
        """The point of every patch at its time, [B, C, H, W]."""
        rows = leading(x_0).shape[-2] // self.patch
        image = repeat(t, "b (h w) -> b 1 (h p) (w q)", h=rows, p=self.patch, q=self.patch)
        return PathSample(self.path.sample(x_0, eps, image).x_t, t, x_0, eps, self.coefficients(image))
