"""Names of the tensors in published VQ autoencoders: LDM's layout <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from repalign.autoencoders.kl_keys import FIRST_STAGE, to_house

_OFFICIAL, _OURS = "quantize.", "quantizer."
# Ours -> LDM's, in this order: the middle's attention before the levels'.
_RENAMES = (
    (r"^quantizer\.", _OFFICIAL),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.downsamplers\.0\.conv\.", ".downsample.conv."),
    (r"\.upsamplers\.0\.conv\.", ".upsample.conv."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def from_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and shapes of our VQ autoencoder for the tensors of a published one; ours pass unchanged.

    Args:
        tensors: an autoencoder, or a whole latent diffusion checkpoint, of which ``first_stage_model`` is taken.
    """
    codebook = {key.removeprefix(FIRST_STAGE): value for key, value in tensors.items()}
    codebook = {k.replace(_OFFICIAL, _OURS, 1): v for k, v in codebook.items() if k.startswith((_OFFICIAL, _OURS))}
    return {**to_house(tensors), **codebook}


def to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LDM's keys and shapes for the tensors of our VQ autoencoder (weights, or their gradients)."""
    levels = [int(match[1]) for key in tensors if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))]
    renamed = {}
    for key, value in tensors.items():
        is_projection = re.search(r"\.to_(?:[qkv]|out\.0)\.weight$", key)
        key = re.sub(r"^decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{max(levels) - int(m[1])}.", key)
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value[:, :, None, None] if is_projection else value
    return renamed
