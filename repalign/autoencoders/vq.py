"""The VQ autoencoder of latent diffusion: vq-f4, vq-f8, vq-f16."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repalign.autoencoders.ldm_nets import ldm_decoder, ldm_encoder
from repalign.autoencoders.quantizer import Quantized, VectorQuantizer
from repalign.autoencoders.vq_keys import from_ldm
from repalign.autoencoders.weights import fingerprint_of, load_exactly, read_weights, write_weights
from repalign.protocols import LatentNorm
from repalign.state import Gaussian, State


class VQAutoencoder(nn.Module):
    """Convolutional autoencoder whose decoder begins with a codebook (Rombach et al., arXiv:2112.10752, section 3.1).

    The latent that is diffused lies BEFORE the codebook: :meth:`encode` does not quantise, :meth:`decode` does, so that
    the codebook absorbs small errors of a diffusion model. The networks are those of the KL autoencoder with half the
    encoder's output, since there is no variance.

    Reads ``weights`` in LDM's layout (``models/first_stage_models/vq-f4/model.ckpt``, bare or inside a latent diffusion
    checkpoint), or its own.

    Args:
        weights: path of a weights file, or 'random'.
        norm: between raw and normalised latents; LDM's VQ models diffuse raw ones.
        codes: number of codes.
        channels: C of the latent = width of a code.
        widths: of the levels, from full resolution down; each but the last halves the side.
        depth: residual blocks per level of the encoder.
        groups: of every group norm.
        attention_levels: levels (0 = full resolution) that attend besides the lowest-resolution middle.
        z_channels: channels between the 1x1 convolutions around the latent and the networks; ``channels`` when None.
        beta, legacy: see :class:`repalign.autoencoders.quantizer.VectorQuantizer`.

    Attributes:
        downsampling: image side / latent side.
        sizes: the options that a file of these weights asks for.
        provenance: what the loaded file says of its origin; empty for random weights and foreign files.

    Raises:
        UserError: naming ``autoencoder.weights`` when the file is missing or of another architecture.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None,
        norm: LatentNorm | None,
        codes: int = 8192,
        channels: int = 3,
        widths: Sequence[int] = (128, 256, 512),
        depth: int = 2,
        groups: int = 32,
        attention_levels: Collection[int] = (),
        z_channels: int | None = None,
        beta: float = 0.25,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        inner = channels if z_channels is None else z_channels
        self.channels = channels
        self.downsampling = 2 ** (len(widths) - 1)
        self.sizes: Mapping[str, Any] = {
            "codes": codes,
            "channels": channels,
            "widths": list(widths),
            "depth": depth,
            "groups": groups,
            "attention_levels": list(attention_levels),
            "z_channels": inner,
        }
        self.encoder = ldm_encoder(inner, widths, depth, groups, attention_levels)
        self.decoder = ldm_decoder(inner, widths, depth, groups, attention_levels)
        self.quant_conv = nn.Conv2d(inner, channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, inner, 1)
        self.quantizer = VectorQuantizer(codes, channels, beta, legacy)
        self.norm = norm
        self.provenance: Mapping[str, Any] = {}
        if weights != "random":
            tensors, self.provenance = read_weights(weights)
            load_exactly(self, from_ldm(tensors), weights)

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Gaussian:
        """Pictures in [0, 1] -> latents before the codebook, without randomness."""
        return Gaussian(self.quant_conv(self.encoder(images * 2 - 1)))

    def quantize(self, raw: Float[Tensor, "b c h2 w2"]) -> Quantized:
        """Latents -> their nearest codes."""
        return self.quantizer(raw)

    def code_usage(self, indices: Int[Tensor, "*positions"]) -> dict[str, Tensor]:
        """``perplexity`` and number of ``codes_used`` of a set of indices."""
        return self.quantizer.usage(indices)

    def decode_quantized(self, latent: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        """Codes -> pictures in [-1, 1] that may overshoot."""
        return self.decoder(self.post_quant_conv(latent))

    def decode_unclamped(self, raw: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        """Latents -> pictures in [-1, 1] that may overshoot; quantises first."""
        return self.decode_quantized(self.quantize(raw).latent)

    def decode(self, raw: State) -> Float[Tensor, "b 3 h w"]:
        """Latents -> pictures, clamped to [0, 1]; quantises first."""
        assert isinstance(raw, Tensor), "a VQ autoencoder decodes one stream"
        return ((self.decode_unclamped(raw) + 1) / 2).clamp(0, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that an adaptive adversarial term compares gradients at."""
        return self.decoder.get_parameter("conv_out.weight")

    def save(self, path: str | Path, provenance: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> None:
        """Write the weights, with sizes and provenance in the file's metadata.

        Args:
            path: .safetensors.
            provenance: plain values.
            dtype: of the stored tensors; float16 halves the file.
        """
        write_weights(self, path, {"autoencoder": {"class": type(self).__name__, **self.sizes}, **provenance}, dtype)

    @property
    def fingerprint(self) -> str:
        """Stands for class and weights: the name under which latents may be cached."""
        return fingerprint_of(self)
