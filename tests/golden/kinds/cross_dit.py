"""Cross-DiT: PixArt-alpha's network by diffusers, and the flow loss around it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from repalign.backbones.cross_dit import CrossDiT
from repalign.checkpoints.cross_dit import PixArtDiffusersAdapter
from repalign.nn.cross import SharedModulation
from repalign.objectives.denoising import Denoising
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.state import Cond, Draw, Output, Tokens
from tests.golden.building import collect_gradients
from tests.golden.runner import Case, kind, only_keys

PATCH = 2
KEYS = ("heads", "head_dim", "depth", "out", "sample_size", "caption", "interp", "size_cond")


def build(config: Mapping[str, Any], weights: Mapping[str, Tensor], latent: Tensor, time_scale: float) -> CrossDiT:
    """The network of a config with imported weights, evaluating; ``out`` says whether it has a variance half."""
    only_keys(config, KEYS)
    channels = latent.shape[1]
    network = CrossDiT(
        latent_shape=(channels, *latent.shape[-2:]),
        context_dim=config["caption"],
        pooled_dim=None,
        patch=PATCH,
        dim=config["heads"] * config["head_dim"],
        depth=config["depth"],
        heads=config["heads"],
        modulation=partial(SharedModulation, size=config.get("size_cond", False)),
        variance_head=config["out"] == 2 * channels,
        time_scale=time_scale,
        base_side=config["sample_size"] // PATCH,
        interpolation=config["interp"],
    )
    network.load_state_dict(PixArtDiffusersAdapter().from_official(weights)["backbone"])
    return network.eval()


def joined(output: Output) -> Tensor:
    """Prediction and variance along the channels, as the official output has them."""
    assert isinstance(output.pred, Tensor)
    return torch.cat([output.pred, *(head for head in output.heads.values() if isinstance(head, Tensor))], 1)


@kind("cross_dit.forward")
def forward(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    x, t, text = inputs["latent"], inputs["t"], Tokens(inputs["text"])
    network = build(case.config, case.weights, x, time_scale=1.0)
    size = torch.cat([inputs["resolution"], inputs["aspect_ratio"]], 1) if "resolution" in inputs else None
    modulation = network.modulation
    assert isinstance(modulation, SharedModulation)
    with torch.no_grad():
        masked = Cond(text=text, text_mask=inputs["mask"].bool(), size=size)
        t_emb = modulation.embed(t, masked)
        return {
            "out_masked": joined(network(x, t, masked)),
            "out_unmasked": joined(network(x, t, Cond(text=text, size=size))),
            "t_emb": t_emb,
            "mod6": modulation.shared(t_emb),
            "text_proj": network.text_embed(inputs["text"]),
            "tokens_in": network.embed(x),
        }


@kind("cross_dit.rf_loss")
def rf_loss(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    network = build(case.config, case.weights, inputs["x0"], time_scale=1000.0)
    objective = Denoising(LinearPath(), Velocity(), Uniform())
    mask = inputs["mask"].bool() if "mask" in inputs else None
    draw = Draw(t=inputs["t"], eps=inputs["noise"])
    step = objective(network, inputs["x0"], Cond(text=Tokens(inputs["text"]), text_mask=mask), draw)
    per_sample = step.losses["denoising"]
    gradients = PixArtDiffusersAdapter().to_official({"backbone": collect_gradients(network, per_sample.mean())})
    return {
        "v": step.output.pred,
        "loss_per_sample": per_sample,
        "loss": per_sample.mean(),
        **{f"grad/{key}": value for key, value in gradients.items()},
    }
