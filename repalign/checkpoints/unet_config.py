"""What diffusers calls the parts of a U-Net."""

from __future__ import annotations

from typing import Any

from torch import nn

from repalign.backbones.unet import UNet
from repalign.errors import UserError
from repalign.nn.conv_blocks import ConvDown
from repalign.nn.spatial_attention import SpatialTransformer


def unet_config(network: nn.Module) -> dict[str, Any]:
    """The ``config.json`` of ``UNet2DConditionModel``, or of ``UNet2DModel`` without a context.

    Raises:
        UserError: for another network, or one that diffusers has no equal of: blocks modulated by scale and shift,
            resampling by residual blocks, transformers without a context, a variance head.
    """
    if not isinstance(network, UNet):
        raise UserError(
            f"task.family: unet_diffusers is another network than {type(network).__name__}; compose a U-Net"
        )
    grid = network.tap_specs["mid"].grid
    assert grid is not None
    down: list[Any] = list(network.down)
    middle: Any = network.middle[0].attention
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
        "sample_size": grid[0] * network.side_multiple,
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
