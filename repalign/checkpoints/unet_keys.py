"""Names of a U-Net's layers in LDM's and in diffusers' files, from the network's own structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from repalign.backbones.unet import UNet
from repalign.nn.conv_blocks import ConvDown, ConvUp
from repalign.nn.spatial_attention import SpatialTransformer

Names = Mapping[str, str]  # of ours -> of the file


@dataclass(frozen=True)
class Layout:
    """How a family of files names the layers inside a block and the blocks themselves.

    Attributes:
        residual, attention: layers of a residual block and of an attention without context.
        down, up: the convolution of a halving and of a doubling.
        blocks: the blocks of a network, stem and output included.
    """

    residual: Names
    attention: Names
    down: str
    up: str
    blocks: Callable[[UNet], Names]


def layer_names(network: UNet, layout: Layout) -> dict[str, str]:
    """The name in the file of every layer with weights, by its name in the network."""
    blocks = layout.blocks(network)
    names = {}
    for layer in dict.fromkeys(key.rpartition(".")[0] for key in network.state_dict()):
        block = max((b for b in blocks if layer == b or layer.startswith(f"{b}.")), key=len)
        inside = layer.removeprefix(block).removeprefix(".")
        names[layer] = ".".join(filter(None, (blocks[block], _inside(network, layout, block, inside))))
    return names


def _inside(network: UNet, layout: Layout, block: str, layer: str) -> str:
    if not layer:
        return ""
    part = network.get_submodule(block)
    if isinstance(part, ConvDown):
        return layout.down
    if isinstance(part, ConvUp):
        return layout.up
    if isinstance(part, SpatialTransformer):
        return _transformer(layer)
    return {**layout.residual, **layout.attention}[layer]


def _transformer(layer: str) -> str:
    if not layer.startswith("blocks."):
        return layer  # norm, proj_in, proj_out
    _, number, inside = layer.split(".", 2)
    for ours, theirs in _TRANSFORMER:
        inside = inside.replace(ours, theirs)
    return f"transformer_blocks.{number}.{inside}"


_TRANSFORMER = (
    ("self_attention.", "attn1."),
    ("cross_attention.", "attn2."),
    (".proj", ".to_out.0"),
    (".q", ".to_q"),
    (".k", ".to_k"),
    (".v", ".to_v"),
    ("mlp.fc1", "ff.net.0.proj"),
    ("mlp.fc2", "ff.net.2"),
)


def _ldm_blocks(network: UNet) -> Names:
    names = {
        "time_embed.mlp.0": "time_embed.0",
        "time_embed.mlp.2": "time_embed.2",
        "label_embed": "label_emb",
        "stem": "input_blocks.0.0",
        "middle.0.residual": "middle_block.0",
        "middle.0.attention": "middle_block.1",
        "middle.1.residual": "middle_block.2",
        "out_norm": "out.0",
        "out": "out.2",
    }
    entry = 1
    for k in range(len(network.down)):
        names |= {f"down.{k}.residual": f"input_blocks.{entry}.0", f"down.{k}.attention": f"input_blocks.{entry}.1"}
        entry += 1
        level, place = divmod(k, network.depth)
        if place == network.depth - 1 and level < len(network.halvings):
            names[f"halvings.{level}"] = f"input_blocks.{entry}.0"
            entry += 1
    for k, block in enumerate(network.up):
        names |= {f"up.{k}.residual": f"output_blocks.{k}.0", f"up.{k}.attention": f"output_blocks.{k}.1"}
        level, place = divmod(k, network.depth + 1)
        if place == network.depth and level < len(network.doublings):
            names[f"doublings.{level}"] = f"output_blocks.{k}.{1 if block.attention is None else 2}"
    return names


def _diffusers_blocks(network: UNet) -> Names:
    names = {
        "time_embed.mlp.0": "time_embedding.linear_1",
        "time_embed.mlp.2": "time_embedding.linear_2",
        "label_embed": "class_embedding",
        "stem": "conv_in",
        "middle.0.residual": "mid_block.resnets.0",
        "middle.0.attention": "mid_block.attentions.0",
        "middle.1.residual": "mid_block.resnets.1",
        "out_norm": "conv_norm_out",
        "out": "conv_out",
    }
    for way, count, depth in (("down", len(network.down), network.depth), ("up", len(network.up), network.depth + 1)):
        for k in range(count):
            level, place = divmod(k, depth)
            names[f"{way}.{k}.residual"] = f"{way}_blocks.{level}.resnets.{place}"
            names[f"{way}.{k}.attention"] = f"{way}_blocks.{level}.attentions.{place}"
    for level in range(len(network.halvings)):
        names[f"halvings.{level}"] = f"down_blocks.{level}.downsamplers.0"
        names[f"doublings.{level}"] = f"up_blocks.{level}.upsamplers.0"
    return names


LDM = Layout(
    residual={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "cond": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    attention={"norm": "norm", "attention.qkv": "qkv", "attention.proj": "proj_out"},
    down="op",
    up="conv",
    blocks=_ldm_blocks,
)
DIFFUSERS = Layout(
    residual={
        "norm1": "norm1",
        "conv1": "conv1",
        "cond": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
    attention={"norm": "group_norm", "attention.qkv": "to_qkv", "attention.proj": "to_out.0"},
    down="conv",
    up="conv",
    blocks=_diffusers_blocks,
)
