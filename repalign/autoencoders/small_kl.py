"""A KL autoencoder small enough to be trained on a laptop and shipped with the project."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.autoencoders.kl import KLAutoencoder
from repalign.autoencoders.weights import load_exactly, read_weights
from repalign.errors import UserError
from repalign.protocols import LatentNorm


class ResidualBlock(nn.Module):
    """x + conv(SiLU(conv(SiLU(GN(x))))), 3x3 convolutions; the second starts at zero: the block is the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, dim)
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return x + self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))


class SmallKLAutoencoder(KLAutoencoder):
    """Autoencoder for small pictures on a CPU: everything expensive happens at a quarter of the side or below.

    Encoder: 4x4 patches, a residual block, then per further halving a strided 2x2 convolution and two blocks. Decoder:
    two blocks at the latent's side, pixel shuffle by 2 with one block per side up to half the picture's, and a last
    shuffle to pixels. A picture of 64 px becomes a latent of 8x8 with 8 channels through 2.3 M parameters.

    Args:
        weights: path of a file of :meth:`save`, or 'random'.
        channels: C of the latent.
        downsampling: image side / latent side; a power of two from 4.
        width: of the encoder at a quarter of the side; a multiple of 16. All other widths follow from it.
        norm: between raw and normalised latents; None takes the statistics stored with the weights. Random weights have
            none: the attribute is None then.

    Raises:
        UserError: for impossible sizes; for weights that are missing or of other sizes (``autoencoder.weights``).
    """

    def __init__(
        self,
        *,
        weights: str | Path | None,
        channels: int = 8,
        downsampling: int = 8,
        width: int = 64,
        norm: LatentNorm | None = None,
    ) -> None:
        super().__init__()
        if downsampling < 4 or downsampling & (downsampling - 1):
            raise UserError(f"autoencoder.downsampling: expected a power of two from 4, found {downsampling}")
        if width < 16 or width % 16:
            raise UserError(f"autoencoder.width: expected a multiple of 16, found {width}")
        self.channels = channels
        self.downsampling = downsampling
        self.sizes = {"channels": channels, "downsampling": downsampling, "width": width}
        halvings = downsampling.bit_length() - 3  # beyond the quarter of the side
        widths = [width * 2**level for level in range(halvings + 1)]
        self.encoder = _encoder(widths, channels)
        self.decoder = _decoder([3 * w // 2 for w in reversed(widths)] + [width // 2], channels)
        if weights != "random":
            tensors, self.provenance = read_weights(weights)
            load_exactly(self, tensors, weights)
        self.norm = self.stored_norm() if norm is None else norm

    def moments(self, signed: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b two_c h2 w2"]:
        return self.encoder(signed)

    def decode_unclamped(self, raw: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        return self.decoder(raw)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder[-2].get_parameter("weight")  # before the last pixel shuffle


def _encoder(widths: list[int], channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), ResidualBlock(widths[0])]
    for dim_in, dim in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(dim_in, dim, 2, stride=2), ResidualBlock(dim), ResidualBlock(dim)]
    return nn.Sequential(*layers, nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 2 * channels, 1))


def _decoder(widths: list[int], channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels, widths[0], 3, padding=1),
        ResidualBlock(widths[0]),
        ResidualBlock(widths[0]),
    ]
    for dim_in, dim in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Conv2d(dim_in, 4 * dim, 1), nn.PixelShuffle(2), ResidualBlock(dim)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(widths[-1], 12, 3, padding=1), nn.PixelShuffle(2))
