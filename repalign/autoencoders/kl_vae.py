"""The KL autoencoder of latent diffusion: SD-VAE (f8c4), SD3 (f8c16), the f4 to f32 models of LDM."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from repalign.autoencoders.kl import KLAutoencoder
from repalign.autoencoders.kl_keys import to_house
from repalign.autoencoders.kl_nets import KLDecoder, KLEncoder
from repalign.autoencoders.weights import load_exactly, read_weights
from repalign.protocols import LatentNorm


class SDAutoencoder(KLAutoencoder):
    """Convolutional variational autoencoder with a slight KL penalty (Rombach et al., arXiv:2112.10752, section 3.1).

    Encoder: residual blocks per level, strided convolution between levels, attention at the lowest. Decoder: its mirror
    with nearest-neighbour upsampling. 1x1 convolutions stand on both sides of the latent (not in SD3).

    Reads ``weights`` in the layout of diffusers (``diffusion_pytorch_model.safetensors`` of stabilityai/sd-vae-ft-mse,
    sd-vae-ft-ema or of the folder ``vae`` of stable-diffusion-3-medium), or of LDM and Stable Diffusion checkpoints.

    Args:
        weights: path of a weights file, or 'random'.
        norm: ``ScaleShift(0.18215)`` for SD, ``ScaleShift(1.5305, 0.0609)`` for SD3.
        channels: of the latent.
        widths: of the levels, from full resolution down; each but the last halves the side.
        depth: residual blocks per level of the encoder.
        groups: of every group norm.
        attention_levels: levels (0 = full resolution) that attend besides the lowest-resolution middle.
        quant: whether 1x1 convolutions stand around the latent.
        z_channels: channels between those convolutions and the networks; ``channels`` when None.

    Raises:
        UserError: naming ``autoencoder.weights`` when the file is missing or of another architecture.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None,
        norm: LatentNorm,
        channels: int = 4,
        widths: Sequence[int] = (128, 256, 512, 512),
        depth: int = 2,
        groups: int = 32,
        attention_levels: Collection[int] = (),
        quant: bool = True,
        z_channels: int | None = None,
    ) -> None:
        super().__init__()
        inner = channels if z_channels is None else z_channels
        self.channels = channels
        self.downsampling = 2 ** (len(widths) - 1)
        self.sizes = {
            "channels": channels,
            "widths": list(widths),
            "depth": depth,
            "groups": groups,
            "attention_levels": list(attention_levels),
            "quant": quant,
            "z_channels": inner,
        }
        self.encoder = KLEncoder(2 * inner, widths, depth, groups, attention_levels)
        self.decoder = KLDecoder(inner, widths, depth, groups, attention_levels)
        self.quant_conv = nn.Conv2d(2 * inner, 2 * channels, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, inner, 1) if quant else nn.Identity()
        self.norm = norm
        if weights != "random":
            tensors, self.provenance = read_weights(weights)
            load_exactly(self, to_house(tensors), weights)

    def moments(self, signed: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b two_c h2 w2"]:
        return self.quant_conv(self.encoder(signed))

    def decode_unclamped(self, raw: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        return self.decoder(self.post_quant_conv(raw))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.get_parameter("conv_out.weight")
