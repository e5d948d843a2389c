"""DDT (MCG-NJU/DDT): networks, layers, loss. Its time runs from noise (0) to data (1): t_ddt = 1 - t, v_ddt = -v."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import MLPHead
from repalign.aligners.similarities import CosineDistance
from repalign.aligners.targets import BilinearTarget, EncoderTarget
from repalign.backbones.clocks import ReversedClock
from repalign.backbones.ddt import DDT
from repalign.backbones.improved_dit import ImprovedDiT
from repalign.checkpoints.ddt import DDTAdapter
from repalign.checkpoints.keys import StateDict
from repalign.conditioners.label import LabelConditioner
from repalign.encoders.preprocess import EncoderInput
from repalign.encoders.weights import fill
from repalign.nn.embed import sinusoid
from repalign.nn.norm import RMSNorm
from repalign.nn.rotary import Rotary2d, rotary_angles
from repalign.objectives.denoising import Denoising
from repalign.objectives.weighting import InverseVarianceWeight, RatioWeight, Weighting
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import LogitNormal, Uniform
from repalign.state import Cond, TokenSpec
from repalign.training.step import training_losses
from tests.golden.building import RecordedRandom, collect_gradients
from tests.golden.kinds.repa import _StoredEncoder
from tests.golden.kinds.repa_encoders import card_of
from tests.golden.kinds.sit import pick
from tests.golden.runner import Case, kind, only_keys

NETWORK_KEYS = (
    "in_channels",
    "num_groups",
    "hidden_size",
    "num_blocks",
    "num_encoder_blocks",
    "patch_size",
    "num_classes",
    "num_groups_is",  # a remark: "attention heads"
    "learn_sigma",  # an argument that the official network ignores
)
# The thresholds of the last two are defaults of the official functions, named the wrong way round for its time.
WEIGHTS: Mapping[str, Weighting | None] = {
    "constant": None,
    "snr": RatioWeight(),
    "inverse_sigma": InverseVarianceWeight(),
    "minsnr": RatioWeight(low=5.0),
    "maxsnr": RatioWeight(high=5.0),
}


def adapter_of(config: Mapping[str, Any]) -> DDTAdapter:
    """The adapter for a network's config, of live weights."""
    encoder = config.get("num_encoder_blocks")
    blocks = None if encoder is None else (encoder, config["num_blocks"] - encoder)
    return DDTAdapter(config["in_channels"], blocks, average=False)


def build(config: Mapping[str, Any], weights: StateDict, size: tuple[int, int]) -> DDT | ImprovedDiT:
    """The network with imported weights for a latent of this size, in evaluation mode, behind no clock."""
    only_keys(config, NETWORK_KEYS, "config of the network")
    options = {
        "latent_shape": (config["in_channels"], *size),
        "num_classes": config["num_classes"],
        "patch": config["patch_size"],
        "dim": config["hidden_size"],
        "depth": config["num_blocks"],
        "heads": config["num_groups"],
    }
    encoder = config.get("num_encoder_blocks")
    network = ImprovedDiT(**options) if encoder is None else DDT(**options, encoder_depth=encoder)
    network.load_state_dict(adapter_of(config).from_official(weights)["backbone"])
    return network.eval()


def size_of(x: Tensor) -> tuple[int, int]:
    """Height and width of a latent."""
    return x.shape[-2], x.shape[-1]


@kind("ddt.forward")
def forward(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    cond = Cond(label=inputs["y"])
    backbone = ReversedClock(build(case.config, case.weights, size_of(inputs["x"])))
    wide = ReversedClock(build(case.config, case.weights, size_of(inputs["x_rect"])))
    with torch.no_grad():
        first = backbone(inputs["x"], 1 - inputs["t"], cond)
        second = backbone(inputs["x2"], 1 - inputs["t2"], cond, carry=first.carry)
        rect = wide(inputs["x_rect"], 1 - inputs["t"], cond)
    return {
        "v": -first.pred,
        "s": first.carry,
        "v2_with_cached_s": -second.pred,
        "v_rect": -rect.pred,
        "s_rect": rect.carry,
    }


@kind("ddt.improved_dit_forward")
def improved_dit_forward(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    backbone = ReversedClock(build(case.config, case.weights, size_of(inputs["x"])))
    with torch.no_grad():
        return {"v": -backbone(inputs["x"], 1 - inputs["t"], Cond(label=inputs["y"])).pred}


@kind("ddt.rope_time_rms")
def rope_time_rms(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("head_dim", "theta", "scale", "max_period", "eps"))
    options = {"theta": float(config["theta"]), "extent": float(config["scale"])}
    tables = {
        "rope_4x4": rotary_angles(config["head_dim"], (4, 4), **options),
        "rope_4x6": rotary_angles(config["head_dim"], (4, 6), **options),
        "rope72_3x3": rotary_angles(72, (3, 3), **options),
    }
    rotary = Rotary2d(config["head_dim"], (4, 4), **options)
    norm = RMSNorm(inputs["rms_weight"].numel(), config["eps"])
    norm.load_state_dict({"weight": inputs["rms_weight"]})
    return {
        **{f"{name}_cos": angles.cos() for name, angles in tables.items()},
        **{f"{name}_sin": angles.sin() for name, angles in tables.items()},
        **{f"{name}_rot": rotary(inputs[name].transpose(1, 2)).transpose(1, 2) for name in ("q", "k")},
        "t_freq": sinusoid(inputs["t"], 256, config["max_period"]),
        "t_freq_dim6": sinusoid(inputs["t"], 6, config["max_period"]),
        "rms_out": norm(inputs["rms_x"]),
    }


LOSS_KEYS = (
    "denoiser",
    "align_layer_1based",
    "feat_loss_weight",
    "lognorm_t",
    "loss_weight",
    "null_condition_p",
    "proj_hidden",
    "proj_encoder_dim",
    "feature_grid",
)


@kind("ddt.loss_repa")
def loss_repa(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, LOSS_KEYS)
    config, inputs = case.config, case.inputs
    network = build(config["denoiser"], case.weights, size_of(inputs["latents"]))
    tap = tap_of(network, config["align_layer_1based"])
    grid, size = config["feature_grid"], len(inputs["labels"])
    encoders = {"main": _StoredEncoder(TokenSpec(config["proj_encoder_dim"], (grid, grid)))}
    aligner = Aligner(
        tap=tap,
        target=BilinearTarget(EncoderTarget(), tap),
        head=partial(MLPHead, hidden=config["proj_hidden"]),
        similarities=[(1.0, CosineDistance())],
        weight=config["feat_loss_weight"],
        tap_specs=network.tap_specs,
        features={name: encoder.spec for name, encoder in encoders.items()},
    )
    adapter = adapter_of(config["denoiser"])
    aligner.head.load_state_dict(adapter.from_official(case.weights)["aligners.repa.head"])
    # With the time turned round the logit of t changes its sign, and U becomes 1 - U.
    time = -inputs["t_normal"] if config["lognorm_t"] else 1 - inputs["t_uniform"]
    draws = {"t": time, "eps": inputs["noise"], "drop/label": inputs["label_drop_uniform"]}
    random = RecordedRandom(size, draws, {})
    conditioner = LabelConditioner(config["denoiser"]["num_classes"], config["null_condition_p"])
    losses = training_losses(
        backbone=ReversedClock(network),
        objective=Denoising(
            LinearPath(),
            Velocity(),
            LogitNormal() if config["lognorm_t"] else Uniform(),
            pick(WEIGHTS, config["loss_weight"], "loss_weight"),
        ),
        conditioner=conditioner,
        aligners={"repa": aligner},
        encoders=encoders,
        x_0=inputs["latents"],
        batch={"label": inputs["labels"], "features/main": inputs["dino_tokens"]},
        random=random,
    )
    null = conditioner.null(size, inputs["labels"].device)
    dropped = Cond(label=inputs["labels"]).where(conditioner.draw_drop(random)["label"], null)
    found = {
        "loss": losses.total,
        "fm_loss": losses.terms["denoising"],
        "cos_loss": losses.terms["align/repa"],
        "labels_after_drop": dropped.label,
    }
    for name, of in (("grad", losses.total), ("grad_cos_only", losses.terms["align/repa"])):
        parts = {
            "backbone": collect_gradients(network, of),
            "aligners.repa.head": collect_gradients(aligner.head, of),
        }
        found |= {f"{name}/{key}": value for key, value in adapter.to_official(parts).items()}
    return found


def tap_of(network: DDT | ImprovedDiT, layer: int) -> str:
    """The tap of a layer as the official code counts, through both halves."""
    return list(network.tap_specs)[layer - 1]


@kind("ddt.encoder_input")
def encoder_input(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("image", "patch"))
    card, patch, positions = card_of("dinov2"), case.config["patch"], case.inputs["pos_embed"]
    # The official code looks at pictures of 224/256 of their size, whatever the patch.
    height, width = (int(224 * side / 256) for side in case.config["image"])
    prepared = EncoderInput(card.mean, card.std, (height, width))(case.inputs["raw_images"])
    sizes = {**card.architecture, "patch_size": patch, "embed_dim": positions.shape[-1], "depth": 1, "num_heads": 1}
    grid = math.isqrt(positions.shape[1] - 1)
    donor, network = (
        timm.create_model(card.timm, num_classes=0, mlp_ratio=1, img_size=size, **sizes)
        for size in (patch * grid, (height // patch * patch, width // patch * patch))
    )
    fill(network, card, {**donor.state_dict(), "pos_embed": positions}, "the case")
    return {"encoder_input": prepared, "encoder_pos_embed": network.pos_embed.detach()}
