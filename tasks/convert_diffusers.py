"""Transformers in diffusers' layout: a folder with config.json and safetensors, which diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repalign.backbones.cross_dit import CrossDiT
from repalign.backbones.dit import DiT
from repalign.backbones.mmdit import MMDiT
from repalign.checkpoints.unet_config import unet_config
from repalign.errors import UserError
from repalign.folders import new_folder
from repalign.nn.cross import SharedModulation
from repalign.nn.joint import JointBlock

NETWORKS = ("transformer", "unet")  # sub-folders of a pipeline
WEIGHTS = "diffusion_pytorch_model.safetensors"


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a diffusers model folder, whatever the number of its files; of a pipeline, those of its network.

    Raises:
        UserError: when it holds no safetensors.
    """
    inner = [folder / name for name in NETWORKS if (folder / name).is_dir()]
    files = sorted((inner or [folder])[0].glob("*.safetensors"))
    if not files:
        raise UserError(f"task.input: no .safetensors in '{folder}'; give the folder of a network or a pipeline")
    return {key: value for file in files for key, value in load_file(file).items()}


def write_folder(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Configuration and weights; the folder is whole or not there.

    Raises:
        UserError: when the folder holds something.
    """
    with new_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        save_file({key: value.contiguous() for key, value in state.items()}, partial / WEIGHTS, {"format": "pt"})


def sd3_config(network: nn.Module) -> dict[str, Any]:
    """Arguments of ``SD3Transformer2DModel``.

    Raises:
        UserError: for a network that it cannot be.
    """
    _require(isinstance(network, MMDiT), "sd3_diffusers", network, "backbone=mmdit_d24")
    assert isinstance(network, MMDiT)
    if network.pooled_embed is None:
        raise UserError("task.family: diffusers' SD3 has a pooled text vector, and this network has none")
    blocks = [block for block in network.blocks if isinstance(block, JointBlock)]
    attention, dim = blocks[0].image.attention, network.linear.in_features
    _require_ratio(blocks[0].image.mlp.fc1.out_features, dim)
    side = round(network.pos_embed.shape[1] ** 0.5)
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": round(network.table_spacing * side * network.patch),  # read for positions, which are stored
        "patch_size": network.patch,
        "in_channels": network.patchify.in_channels,
        "out_channels": network.patchify.in_channels,
        "num_layers": len(blocks),
        "attention_head_dim": dim // attention.heads,
        "num_attention_heads": attention.heads,
        "joint_attention_dim": network.text_embed.in_features,
        "caption_projection_dim": dim,
        "pooled_projection_dim": network.pooled_embed.in_dim,
        "pos_embed_max_size": side,
        "dual_attention_layers": [number for number, block in enumerate(blocks) if block.image.dual],
        "qk_norm": None if isinstance(attention.q_norm, nn.Identity) else "rms_norm",
    }


def pixart_config(network: nn.Module) -> dict[str, Any]:
    """Arguments of ``PixArtTransformer2DModel``.

    Raises:
        UserError: for a network that it cannot be.
    """
    _require(isinstance(network, CrossDiT), "pixart_diffusers", network, "backbone=cross_dit_xl")
    assert isinstance(network, CrossDiT)
    modulation = network.modulation
    if not isinstance(modulation, SharedModulation) or isinstance(network.text_embed, nn.Linear) or network.cross_norm:
        raise UserError("task.family: PixArt has adaLN-single, a text MLP and no norm before cross-attention")
    block, channels = network.blocks[0], network.patchify.in_channels
    _require_ratio(block.mlp.fc1.out_features, network.dim)
    if not isinstance(block.attention.q_norm, nn.Identity):
        raise UserError("task.family: diffusers' PixArt has no query-key norm; set backbone.qk_norm=false")
    return {
        "_class_name": "PixArtTransformer2DModel",
        "sample_size": network.base_side * network.patch,
        "patch_size": network.patch,
        "in_channels": channels,
        "out_channels": 2 * channels if network.variance_head else channels,
        "num_layers": len(network.blocks),
        "attention_head_dim": network.dim // block.attention.heads,
        "num_attention_heads": block.attention.heads,
        "cross_attention_dim": network.dim,
        "caption_channels": network.text_embed.fc1.in_features,
        "interpolation_scale": network.interpolation,
        "use_additional_conditions": modulation.size_embed is not None,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
    }


def dit_config(network: nn.Module) -> dict[str, Any]:
    """Arguments of ``DiTTransformer2DModel``.

    Raises:
        UserError: for a network that it cannot be.
    """
    _require(isinstance(network, DiT), "dit_diffusers", network, "backbone=sit_xl_2")
    assert isinstance(network, DiT)
    patchify, block = network.io.get_submodule("patchify"), network.blocks[0]  # type: ignore[attr-defined]
    channels, dim = patchify.in_channels, block.attention.proj.in_features
    _require_ratio(block.mlp.fc1.out_features, dim)
    grid, patch = network.io.grid, patchify.kernel_size[0]
    if grid[0] != grid[1] or not isinstance(block.attention.q_norm, nn.Identity):
        raise UserError("task.family: diffusers' DiT is square and has no query-key norm")
    if isinstance(network.pos_embed, nn.Parameter):
        raise UserError("backbone.train_positions: diffusers' DiT makes its positions and stores none")
    return {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": grid[0] * patch,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": network.io.get_submodule("linear").out_features // patch**2,  # type: ignore[attr-defined]
        "num_layers": len(network.blocks),
        "attention_head_dim": dim // block.attention.heads,
        "num_attention_heads": block.attention.heads,
        "num_embeds_ada_norm": network.label_embed.num_embeddings - 1,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
    }


CONFIGS: Mapping[str, Callable[[nn.Module], dict[str, Any]]] = {
    "sd3_diffusers": sd3_config,
    "pixart_diffusers": pixart_config,
    "dit_diffusers": dit_config,
    "unet_diffusers": unet_config,
}


def _require(holds: bool, family: str, network: nn.Module, mend: str) -> None:
    if not holds:
        raise UserError(f"task.family: {family} is another network than {type(network).__name__}; compose {mend}")


def _require_ratio(hidden: int, dim: int) -> None:
    if hidden != 4 * dim:
        raise UserError(f"task.family: diffusers' MLPs are 4 times as wide as the network; found {hidden} for {dim}")
