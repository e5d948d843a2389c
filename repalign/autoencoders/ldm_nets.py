"""Encoder and decoder of LDM's autoencoders, from diffusers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from repalign.errors import UserError


def ldm_encoder(
    dim_out: int, widths: Sequence[int], depth: int, groups: int, attention_levels: Collection[int]
) -> nn.Module:
    """Pictures [B, 3, H, W] -> [B, dim_out, h, w] at 1 / 2^(levels - 1) of the side.

    Args:
        dim_out: channels of the result.
        widths: of each level, from full resolution down.
        depth: residual blocks per level.
        groups: of every group norm.
        attention_levels: levels (0 = full resolution) that attend behind each residual block; the middle always does.

    Raises:
        UserError: when diffusers is not installed.
    """
    kinds = ["AttnDownEncoderBlock2D" if n in attention_levels else "DownEncoderBlock2D" for n in range(len(widths))]
    return _diffusers().Encoder(
        out_channels=dim_out,
        down_block_types=tuple(kinds),
        block_out_channels=tuple(widths),
        layers_per_block=depth,
        norm_num_groups=groups,
        double_z=False,
    )


def ldm_decoder(
    dim_in: int, widths: Sequence[int], depth: int, groups: int, attention_levels: Collection[int]
) -> nn.Module:
    """The mirror of :func:`ldm_encoder` with one residual block more per level: [B, dim_in, h, w] -> pictures.

    Raises:
        UserError: when diffusers is not installed.
    """
    kinds = ["AttnUpDecoderBlock2D" if n in attention_levels else "UpDecoderBlock2D" for n in range(len(widths))]
    return _diffusers().Decoder(
        in_channels=dim_in,
        up_block_types=tuple(reversed(kinds)),
        block_out_channels=tuple(widths),
        layers_per_block=depth,
        norm_num_groups=groups,
    )


def _diffusers():  # noqa: ANN202  (a module)
    # Imported where it is needed: it takes ten seconds, and most compositions have no network of it.
    try:
        from diffusers.models.autoencoders import vae
    except ModuleNotFoundError as error:
        raise UserError(
            "autoencoder: its networks need diffusers; install the extra 'models': pip install 'repalign[models]'"
        ) from error
    return vae
