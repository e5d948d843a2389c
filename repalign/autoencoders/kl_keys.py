"""Names of the tensors in published KL autoencoders: the layouts of LDM and of diffusers, and ours.

Ours is the present diffusers layout; older diffusers files name the projections of attention otherwise. LDM counts the
decoder's levels from full resolution, diffusers from the lowest; LDM stores attention projections as 1x1 convolutions,
diffusers as matrices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

FIRST_STAGE = "first_stage_model."
# Kept of a full checkpoint; discriminator, LPIPS and the like are left out.
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

_RENAMES = (
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
    (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)

_TO_LDM = (
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)
_PROJECTION = re.compile(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


def to_house(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and shapes of our KL autoencoder for the tensors of a published one; ours pass unchanged.

    Args:
        tensors: an autoencoder, or a whole LDM / Stable Diffusion checkpoint, of which ``first_stage_model`` is taken.
    """
    if any(key.startswith(FIRST_STAGE) for key in tensors):
        tensors = {k.removeprefix(FIRST_STAGE): v for k, v in tensors.items() if k.startswith(FIRST_STAGE)}
    kept = {key: value for key, value in tensors.items() if key.startswith(_PARTS)}
    levels = {int(match[1]) for key in kept if (match := re.match(r"decoder\.up\.(\d+)\.", key))}

    def reverse_level(match: re.Match[str]) -> str:
        return f"decoder.up_blocks.{max(levels) - int(match[1])}."

    renamed = {}
    for key, value in kept.items():
        key = re.sub(r"^decoder\.up\.(\d+)\.", reverse_level, key)
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value.flatten(1) if _PROJECTION.search(key) else value
    return renamed


def to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and shapes of LDM, Stable Diffusion, REPA-E and VA-VAE for the tensors of our KL autoencoder."""
    levels = {int(match[1]) for key in tensors if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", key))}

    def reverse_level(match: re.Match[str]) -> str:
        return f"decoder.up.{max(levels) - int(match[1])}."

    renamed = {}
    for house_key, value in tensors.items():
        key = re.sub(r"^decoder\.up_blocks\.(\d+)\.", reverse_level, house_key)
        for pattern, replacement in _TO_LDM:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value[:, :, None, None] if _PROJECTION.search(house_key) else value
    return renamed


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of diffusers' ``AutoencoderKL`` for the tensors of our KL autoencoder: they are the same."""
    return dict(tensors)
