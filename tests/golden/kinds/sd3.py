"""SD3 and SD3.5 (Stability-AI/sd3.5, diffusers): the network in both layouts, positions, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repalign.backbones.mmdit import MMDiT
from repalign.checkpoints.sd3 import SD3Adapter, SD3DiffusersAdapter
from repalign.conditioners.text import join_text, keep
from repalign.nn.positions import central, paper_positions, position_table
from repalign.state import Cond, TextStates, Tokens
from tests.golden.runner import Case, kind, only_keys

NETWORK_KEYS = (
    "patch_size",
    "in_channels",
    "depth",
    "head_dim",
    "context_dim",
    "pooled_dim",
    "pos_embed_max_size",
    "qk_norm",
    "dual_attention_blocks",
    "mlp_ratio",
    "hidden",  # in words: head_dim * depth
    "heads",  # in words: depth
)
QK_NORMS = {None: False, "rms": True}
SKIPPED = (2,)  # the second block, in every case of the kind


def build(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    latent: Tensor,
    extra_keys: Sequence[str] = (),
    adapter: SD3Adapter | SD3DiffusersAdapter | None = None,
) -> MMDiT:
    """The network of a config with imported weights, in evaluation mode."""
    only_keys(config, (*NETWORK_KEYS, *extra_keys), "config of the network")
    network = MMDiT(
        latent_shape=(config["in_channels"], *latent.shape[-2:]),
        context_dim=config["context_dim"],
        pooled_dim=config["pooled_dim"],
        patch=config["patch_size"],
        depth=config["depth"],
        dim=config["head_dim"] * config["depth"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        qk_norm=QK_NORMS[config.get("qk_norm")],
        dual_blocks=[k + 1 for k in config.get("dual_attention_blocks", ())],
        table_side=config["pos_embed_max_size"],
    )
    network.load_state_dict((adapter or SD3Adapter()).from_official(weights)["backbone"])
    return network.eval()


def condition(inputs: Mapping[str, Tensor], prefix: str = "", skip: tuple[int, ...] = ()) -> Cond:
    """The text of a case, or its ``null_`` twin."""
    return Cond(text=Tokens(inputs[f"{prefix}context"]), pooled=inputs[f"{prefix}pooled"], skip=skip)


def _forward(case: Case, adapter: SD3Adapter | SD3DiffusersAdapter) -> dict[str, Tensor]:
    inputs = case.inputs
    network = build(case.config, case.weights, inputs["latent"], adapter=adapter)
    x, t = inputs["latent"], inputs["t"]
    taps = ("block.1", "block.1/text") if case.config["depth"] > 1 else ("block.1",)
    with torch.no_grad():
        output = network(x, t, condition(inputs), taps=taps)
        skipped = network(x, t, condition(inputs, skip=SKIPPED)).pred
        out = {
            "velocity": output.pred,
            "velocity_skip_blocks": skipped,
            "tokens_in": network.embed(x),
            "cond_vec": network.condition(t, inputs["pooled"]),
            "block0_image": output.taps["block.1"].data,
        }
    return out | {"block0_text": output.taps[tap].data for tap in taps[1:]}


@kind("sd3.mmdit_original")
def mmdit_original(case: Case) -> dict[str, Tensor]:
    return _forward(case, SD3Adapter())


@kind("sd3.mmdit_diffusers")
def mmdit_diffusers(case: Case) -> dict[str, Tensor]:
    return _forward(case, SD3DiffusersAdapter())


@kind("sd3.pos_embed")
def pos_embed(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("dim", "side", "crops", "paper_example"))
    dim, side, example = case.config["dim"], case.config["side"], case.config["paper_example"]
    only_keys(example, ("S", "h_max", "w_max"), "paper_example")
    whole = position_table(dim, side)
    # An official position is index / scaling - offset; ours (index - origin) spacing.
    out = {
        "table_integer": whole[0],
        "table_scale3": position_table(dim, side, 1 / 3)[0],
        "table_scale2_offset1.5": position_table(dim, side, 1 / 2, origin=1.5 * 2)[0],
    }
    for sample in {8, 16, 32, 64, 128, side, 2 * side}:
        out[f"diffusers_table_sample{sample}"] = position_table(dim, side, (sample / 2) / side)[0]
    for height, width in case.config["crops"]:
        out[f"crop_{height}x{width}"] = central(whole, (height, width))[0]
    for axis in ("h", "w"):
        out[f"paper_positions_{axis}"] = paper_positions(example[f"{axis}_max"], example["S"])
    return out


@kind("sd3.text_concat_dropout")
def text_concat_dropout(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("clip_l_dim", "clip_g_dim", "t5_dim", "clip_tokens", "t5_tokens"))
    inputs, states = case.inputs, {}
    for column, name in enumerate(("clip_l", "clip_g", "t5")):
        hidden = inputs[f"{name}_hidden"]
        whole = TextStates(hidden, torch.ones_like(hidden[..., 0], dtype=torch.bool), inputs.get(f"{name}_pooled"))
        states[name] = keep(whole, inputs["keep"][:, column].bool())
    context, pooled = join_text([states["clip_l"], states["clip_g"]], states["t5"])
    return {"context": context, "pooled": pooled}
