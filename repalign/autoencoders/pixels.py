"""Diffusion in pixel space: the autoencoder that does nothing."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from repalign.autoencoders.latent_norm import ScaleShift
from repalign.state import Gaussian, State


class Pixels(nn.Module):
    """latent = 2 image - 1: pictures in [-1, 1] are their own latents.

    Attributes:
        channels: 3.
        downsampling: 1.
        norm: the identity, unless another scale is given (pixels have less energy than unit noise).
    """

    channels = 3
    downsampling = 1
    fingerprint = "pixels"

    def __init__(self, norm: ScaleShift | None = None) -> None:
        super().__init__()
        self.norm = ScaleShift(1.0) if norm is None else norm

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Gaussian:
        """Pictures in [0, 1] -> latents in [-1, 1], without randomness."""
        return Gaussian(images * 2 - 1)

    def decode(self, raw: State) -> Float[Tensor, "b 3 h w"]:
        """Latents -> pictures, clamped to [0, 1]."""
        assert isinstance(raw, Tensor)
        return ((raw + 1) / 2).clamp(0, 1)
