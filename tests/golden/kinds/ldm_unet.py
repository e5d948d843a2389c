"""LDM's U-Net in its own key layout and in diffusers'. Its step k is the house's time (k + 1) / 1000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.backbones.clocks import StepClock
from repalign.backbones.unet import UNet
from repalign.checkpoints.unet import DiffusersUNetAdapter, LDMUNetAdapter
from repalign.state import Cond, Tokens
from tests.golden.runner import Case, kind, only_keys

UNET_KEYS = (
    "image_size in_channels model_channels out_channels num_res_blocks attention_resolutions channel_mult num_heads "
    "num_head_channels use_spatial_transformer transformer_depth context_dim legacy norm_groups num_classes "
    "use_scale_shift_norm resblock_updown dropout use_new_attention_order conv_resample num_heads_upsample"
).split()


def unet(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> UNet:
    """The network of an official configuration with imported weights.

    LDM's ``legacy`` tells two ways to the same heads. Its classes are the rows of the embedding.
    """
    if not config.get("conv_resample", True) or config.get("num_heads_upsample", -1) != -1:
        raise KeyError("config: only resampling with weights and equal numbers of heads are supported")
    size = config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    head_dim = config.get("num_head_channels", -1)
    transformer = config.get("use_spatial_transformer", False)
    multipliers = config.get("channel_mult", (1, 2, 4, 8))
    network = UNet(
        latent_shape=(config["out_channels"], height, width),
        num_classes=(config.get("num_classes") or 1) - 1,
        dim=config["model_channels"],
        multipliers=multipliers,
        depth=config["num_res_blocks"],
        # Factors that no level has do nothing in the official code.
        attention=[f for f in config["attention_resolutions"] if f in [2**k for k in range(len(multipliers))]],
        heads=config.get("num_heads", 1) if head_dim == -1 else None,
        head_dim=None if head_dim == -1 else head_dim,
        transformer_depth=config.get("transformer_depth", 1) if transformer else 0,
        label=config.get("num_classes") is not None,
        context_dim=config.get("context_dim"),
        concat_channels=config["in_channels"] - config["out_channels"],
        groups=config.get("norm_groups", 32),
        scale_shift=config.get("use_scale_shift_norm", False),
        residual_resampling=config.get("resblock_updown", False),
        dropout=config.get("dropout", 0.0),
    )
    by_head = not config.get("use_new_attention_order", False)
    network.load_state_dict(LDMUNetAdapter(network, by_head=by_head).from_official(weights)["backbone"])
    return network.eval()


def cond_of(inputs: Mapping[str, Tensor]) -> Cond:
    """Whatever conditions a case has."""
    context = inputs.get("context")
    return Cond(
        label=inputs.get("y"),
        text=None if context is None else Tokens(context),
        spatial=inputs.get("concat"),
    )


@torch.no_grad()
def forward(network: UNet, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    times = (inputs["t"] + 1).float() / 1000
    eps = StepClock(network, 1000)(inputs["x"], times, cond_of(inputs)).pred
    return {"eps": eps, "time_emb": network.time_embed(inputs["t"].float())}


@kind("ldm.unet")
def ldm_unet(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, UNET_KEYS)
    return forward(unet(case.config, case.weights), case.inputs)


@kind("ldm.unet_diffusers")
def ldm_unet_diffusers(case: Case) -> dict[str, Tensor]:
    config = case.config
    only_keys(
        config,
        "down_block_types up_block_types block_out_channels layers_per_block cross_attention_dim num_heads "
        "norm_num_groups norm_eps transformer_norm_eps in_channels out_channels".split(),
    )
    if (config.get("norm_eps", 1e-5), config.get("transformer_norm_eps", 1e-6)) != (1e-5, 1e-6):
        raise KeyError("config: only eps 1e-5 in residual blocks and 1e-6 in transformers are supported")
    attends = ["Attn" in block for block in config["down_block_types"]]
    if ["Attn" in block for block in reversed(config["up_block_types"])] != attends:
        raise KeyError("config: expected attention on the same levels down and up")
    side, widths = case.inputs["x"].shape[-1], config["block_out_channels"]
    network = UNet(
        latent_shape=(config["out_channels"], case.inputs["x"].shape[-2], side),
        num_classes=0,
        dim=widths[0],
        multipliers=[width // widths[0] for width in widths],
        depth=config["layers_per_block"],
        attention=[2**level for level, attend in enumerate(attends) if attend],
        heads=config["num_heads"],
        transformer_depth=1,
        context_dim=config["cross_attention_dim"],
        concat_channels=config["in_channels"] - config["out_channels"],
        groups=config["norm_num_groups"],
    )
    network.load_state_dict(DiffusersUNetAdapter(network).from_official(case.weights)["backbone"])
    return forward(network.eval(), case.inputs)
