"""The KL autoencoder of latent diffusion: SD-VAE (f8c4), SD3 (f8c16), IN-VAE and VA-VAE (f16c32), LDM's f4 to f32."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.autoencoders.diffusers_folder import check_config
from repalign.autoencoders.kl import KLAutoencoder
from repalign.autoencoders.kl_keys import to_house
from repalign.autoencoders.weights import load_exactly, read_weights
from repalign.errors import UserError, unknown_choice
from repalign.protocols import LatentNorm

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SDAutoencoder(KLAutoencoder):
    """Convolutional variational autoencoder with a slight KL penalty (Rombach et al., arXiv:2112.10752, section 3.1).

    Encoder: residual blocks per level, strided convolution between levels, attention at the lowest. Decoder: its mirror
    with nearest-neighbour upsampling. 1x1 convolutions stand on both sides of the latent (not in SD3). The network is
    ``AutoencoderKL`` of diffusers, and the keys of the state dict are those of its files.

    Reads ``weights`` in the layout of diffusers (``diffusion_pytorch_model.safetensors`` of stabilityai/sd-vae-ft-mse,
    sd-vae-ft-ema or of the folder ``vae`` of stable-diffusion-3-medium; or such a folder with its ``config.json``), or
    of LDM: Stable Diffusion's checkpoints, the files of REPA-E and VA-VAE.

    Pictures larger than ``tile`` are worked on in overlapping tiles whose borders are blended (a quarter of the tile):
    the memory is that of one tile; the result is close to the plain one but not equal, since group norms and attention
    then see one tile. In training mode the trainer's precision holds, and ``encode_dtype`` and ``decode_dtype`` do not.

    Args:
        weights: path of a weights file or of a diffusers folder, or 'random'.
        norm: between raw and normalised latents, ``ScaleShift(0.18215)`` for SD, ``ScaleShift(1.5305, 0.0609)`` for
            SD3; None takes the statistics stored with the weights, if there are any.
        channels: of the latent.
        widths: of the levels, from full resolution down; each but the last halves the side.
        depth: residual blocks per level of the encoder.
        groups: of every group norm.
        attention_levels: levels (0 = full resolution) that attend besides the lowest-resolution middle.
        quant: whether 1x1 convolutions stand around the latent.
        z_channels: channels between those convolutions and the networks; ``channels`` when None.
        tile: side of the tiles in pixels, a multiple of four times the downsampling; None works on whole pictures.
        slice: work on one picture of the batch at a time.
        channels_last: memory format of the convolutions (faster on GPUs with tensor cores).
        encode_dtype: 'float32', 'bfloat16' or 'float16' (by autocast; weights stay as they are).
        decode_dtype: the same for the decoder.

    Raises:
        UserError: naming ``autoencoder.weights`` when the file is missing or of another architecture; for options that
            do not fit; when diffusers is not installed.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None,
        norm: LatentNorm | None,
        channels: int = 4,
        widths: Sequence[int] = (128, 256, 512, 512),
        depth: int = 2,
        groups: int = 32,
        attention_levels: Collection[int] = (),
        quant: bool = True,
        z_channels: int | None = None,
        tile: int | None = None,
        slice: bool = False,
        channels_last: bool = False,
        encode_dtype: str = "float32",
        decode_dtype: str = "float32",
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
        for key, name in (("encode_dtype", encode_dtype), ("decode_dtype", decode_dtype)):
            if name not in DTYPES:
                raise unknown_choice(f"autoencoder.{key}", name, DTYPES)
        self.encode_dtype, self.decode_dtype = DTYPES[encode_dtype], DTYPES[decode_dtype]
        network = _network(inner, widths, depth, groups, attention_levels, quant)
        if quant and inner != channels:
            network.quant_conv = nn.Conv2d(2 * inner, 2 * channels, 1)
            network.post_quant_conv = nn.Conv2d(channels, inner, 1)
        _work_in_parts(network, tile, slice, self.downsampling)
        # In a tuple, so that its parts are registered once and under the keys of the published files.
        self._network = (network,)
        self.encoder, self.decoder = network.encoder, network.decoder
        self.quant_conv, self.post_quant_conv = network.quant_conv, network.post_quant_conv
        if channels_last:
            self.to(memory_format=torch.channels_last)
        if weights != "random":
            tensors, self.provenance = read_weights(weights)
            check_config(weights, self.sizes)
            load_exactly(self, to_house(tensors), weights)
        self.norm = self.stored_norm() if norm is None else norm

    @property
    def network(self) -> AutoencoderKL:
        """The autoencoder of diffusers that does the work, on pictures in [-1, 1]."""
        return self._network[0]

    @property
    def fingerprint(self) -> str:
        """Stands for class, weights and the precision of encoding: the name under which latents may be cached."""
        whole = super().fingerprint
        # Latents of another precision are other latents.
        return whole if self.encode_dtype == torch.float32 else f"{whole}-{str(self.encode_dtype).split('.')[1]}"

    def moments(self, signed: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b two_c h2 w2"]:
        with self._precision(self.encode_dtype, signed.device):
            (posterior,) = self.network.encode(self._typed(signed), return_dict=False)
        return posterior.parameters if self.training else posterior.parameters.float()

    def decode_unclamped(self, raw: Float[Tensor, "b c h2 w2"]) -> Float[Tensor, "b 3 h w"]:
        with self._precision(self.decode_dtype, raw.device):
            (signed,) = self.network.decode(self._typed(raw), return_dict=False)  # pyright: ignore[reportArgumentType]
        return signed if self.training else signed.float()

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.get_parameter("conv_out.weight")

    def _typed(self, x: Tensor) -> Tensor:
        return x.to(self.encoder.conv_in.weight.dtype)

    def _precision(self, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
        if self.training:
            return nullcontext()
        if dtype == torch.float32:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype)


def _network(
    channels: int, widths: Sequence[int], depth: int, groups: int, attention_levels: Collection[int], quant: bool
) -> AutoencoderKL:
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # its import takes seconds
    except ModuleNotFoundError as error:
        raise UserError(
            "autoencoder: SDAutoencoder needs the package diffusers, which is not installed; install the extra "
            "'models': pip install 'repalign[models]'"
        ) from error
    attends = [level in attention_levels for level in range(len(widths))]
    # The annotations of diffusers allow one level alone.
    levels: dict[str, Any] = {
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)),
        "block_out_channels": tuple(widths),
    }
    return AutoencoderKL(
        **levels,
        layers_per_block=depth,
        latent_channels=channels,
        norm_num_groups=groups,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )


def _work_in_parts(network: AutoencoderKL, tile: int | None, slice: bool, downsampling: int) -> None:
    network.use_slicing = slice
    if tile is None:
        return
    if tile < 1 or tile % (4 * downsampling):
        raise UserError(f"autoencoder.tile: expected a multiple of {4 * downsampling} or null, found {tile}")
    network.use_tiling = True
    network.tile_sample_min_size = tile
    network.tile_latent_min_size = tile // downsampling
