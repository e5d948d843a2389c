"""A U-Net as a folder that diffusers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from repalign.backbones.unet import UNet
from repalign.checkpoints.keys import StateDict
from repalign.checkpoints.unet import DiffusersUNetAdapter
from repalign.errors import UserError
from repalign.nn.conv_blocks import ConvDown
from repalign.nn.spatial_attention import SpatialTransformer


def diffusers_config(network: UNet, side: int) -> dict[str, Any]:
    """The ``config.json`` of ``UNet2DConditionModel``, or of ``UNet2DModel`` without a context.

    Args:
        network: of ours.
        side: of the latent, which diffusers takes as the default of its pipelines.

    Raises:
        UserError: for a network that diffusers has no equal of: blocks modulated by scale and shift, resampling by
            residual blocks, transformers without a context, a variance head.
    """
    down, middle = list(network.down), network.middle[0].attention
    transformer = isinstance(middle, SpatialTransformer)
    unequal = {
        "scale_shift": down[0].residual.scale_shift,
        "residual_resampling": any(not isinstance(part, ConvDown) for part in network.halvings),
        "transformer_depth without a context": transformer and network.context_dim is None,
        "variance_head": network.variance_head,
    }
    for name, found in unequal.items():
        if found:
            raise UserError(f"backbone: diffusers has no U-Net with {name}; export it with task.family=ldm")
    ends = down[network.depth - 1 :: network.depth]  # the last block of each level
    widths = [block.residual.conv2.out_channels for block in ends]
    kind = "CrossAttn" if transformer else "Attn"
    kinds = ["" if block.attention is None else kind for block in ends]
    common = {
        "sample_size": side,
        "in_channels": network.channels + network.concat_channels,
        "out_channels": network.channels,
        "layers_per_block": network.depth,
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "norm_num_groups": network.out_norm.num_groups,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "num_class_embeds": None if network.label_embed is None else network.label_embed.num_embeddings,
    }
    if transformer:
        # diffusers calls the number of heads so.
        heads = [network.heads_of(width) for width in widths]
        own = {"attention_head_dim": heads, "cross_attention_dim": network.context_dim}
        depth = {"transformer_layers_per_block": len(middle.blocks)}
        return {"_class_name": "UNet2DConditionModel", **common, **own, **depth}
    attending = {width for width, kind in zip(widths, kinds, strict=True) if kind} | {widths[-1]}
    sizes = {width // network.heads_of(width) for width in attending}
    if len(sizes) > 1:
        raise UserError("backbone: diffusers' U-Net without a context has heads of one width; it needs head_dim")
    return {"_class_name": "UNet2DModel", **common, "attention_head_dim": sizes.pop()}


def write_unet_folder(folder: Path, network: UNet, state: StateDict, side: int) -> None:
    """``config.json`` beside ``diffusion_pytorch_model.safetensors``: what ``from_pretrained`` of diffusers reads.

    Raises:
        UserError: when the folder exists, or diffusers has no such network.
    """
    config = diffusers_config(network, side)
    if folder.exists():
        raise UserError(f"task.output: '{folder}' exists; give a new folder")
    tensors = {key: v.contiguous() for key, v in DiffusersUNetAdapter(network).to_official({"backbone": state}).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(tensors, partial / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder)
