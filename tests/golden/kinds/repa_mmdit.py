"""REPA's text-to-image network (sihyun-yu/REPA, models/mmdit.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from repalign.aligners.heads import MLPHead
from repalign.backbones.mmdit import MMDiT
from repalign.checkpoints.repa import REPAAdapter
from repalign.checkpoints.sd3 import KEYS
from repalign.state import Cond, Tokens
from tests.golden.runner import Case, kind, only_keys

CONFIG_KEYS = (
    "depth",
    "mlp_ratio",
    "encoder_depth",
    "z_dims",
    "projector_dim",
    "hidden_size",
    "num_heads",
    "input_size",
    "patch_size",
    "in_channels",
    "context_in",
    "pos_embed_grid",
)
KEPT = slice(None, None, 5)  # every fifth token of the projected states is stored


@kind("repa.mmdit_forward")
def mmdit_forward(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, CONFIG_KEYS)
    config, inputs = case.config, case.inputs
    network = MMDiT(
        latent_shape=(config["in_channels"], config["input_size"], config["input_size"]),
        context_dim=config["context_in"],
        pooled_dim=None,
        patch=config["patch_size"],
        depth=config["depth"],
        dim=config["hidden_size"],
        heads=config["num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        time_scale=1.0,
        table_side=config["pos_embed_grid"],
        zero_init=False,
    ).eval()
    names = [str(k) for k in range(len(config["z_dims"]))]
    parts = REPAAdapter(names, config["encoder_depth"], KEYS).from_official(case.weights)
    network.load_state_dict(parts["backbone"])
    tap, cond = f"block.{config['encoder_depth']}", Cond(text=Tokens(inputs["context"]))
    with torch.no_grad():
        output = network(inputs["x"], inputs["t"], cond, taps=(tap,))
        out = {"v": output.pred, "v_small": network(inputs["x_small"], inputs["t"], cond).pred}
        for name, dim in zip(names, config["z_dims"], strict=True):
            head = MLPHead(network.tap_specs[tap].dim, dim, hidden=config["projector_dim"])
            head.load_state_dict(parts[f"aligners.{name}.head"])
            out[f"zs_{name}"] = head(output.taps[tap].data)[:, KEPT]
    return out
