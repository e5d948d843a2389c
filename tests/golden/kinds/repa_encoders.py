"""Frozen encoders of REPA: taps, input, position tables; and its data operations."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL.Image
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from datamodules.images import center_crop, to_unit
from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.posterior import from_log_variance, from_std
from repalign.encoders.cards import Card, read_cards
from repalign.encoders.preprocess import input_for
from repalign.encoders.vit import ViTEncoder
from repalign.training.ema import EMA
from tests.golden.runner import Case, kind, only_keys


def card_of(family: str) -> Card:
    """Any card of a family: they differ in size alone."""
    return next(card for card in read_cards().values() if card.family == family)


@kind("repa.encoder_features")
def encoder_features(case: Case) -> dict[str, Tensor]:
    config = case.config
    shared = ("embed_dim", "depth", "num_heads", "mlp_ratio")
    only_keys(config, (*shared, "ln_eps", "clip_ln_eps", "mae_mocov3", "jepa_clip"))
    # output, weight prefix, where its sizes are, epsilon of its norms
    taps = (
        ("mae", "mae.", "mae_mocov3", "ln_eps"),
        ("mocov3", "moco.", "mae_mocov3", "ln_eps"),
        ("jepa", "jepa.", "jepa_clip", "ln_eps"),
        ("clip", "clip.", "jepa_clip", "clip_ln_eps"),
    )
    found = {}
    for family, prefix, sizes, eps in taps:
        image = case.inputs[f"img{config[sizes]['img']}"]
        architecture = {
            **{name: config[name] for name in shared},
            "patch_size": config[sizes]["patch"],
            "norm_layer": partial(nn.LayerNorm, eps=config[eps]),
        }
        weights = {k.removeprefix(prefix): v for k, v in case.weights.items() if k.startswith(prefix)}
        encoder = read(family, weights, architecture, image_size=256, input_size=config[sizes]["img"])
        found[family] = encoder.tokens_of(image).data
    return found


@kind("repa.encoder_preprocess")
def encoder_preprocess(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("encoders", "stride"))
    stride = case.config["stride"]
    image = case.inputs["image"].repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    found = {}
    for family in case.config["encoders"]:
        prepared = prepare(family, image)
        side = image.shape[-1]
        found[f"{family}_{side}"] = prepared[..., ::stride, ::stride]
        found[f"{family}_{side}_shape"] = torch.tensor(prepared.shape)
        found[f"{family}_{side}_mean"] = prepared.double().mean().reshape(1)
    prepared = prepare("dinov2", image.tile(2, 2))
    found["dinov2_512"] = prepared[..., :: 2 * stride, :: 2 * stride]
    found["dinov2_512_shape"] = torch.tensor(prepared.shape)
    found["dinov2_512_mean"] = prepared.double().mean().reshape(1)
    positions = case.inputs["pos_embed37"]
    found["pos_embed_16"] = resampled("dinov2", positions, 256)
    found["pos_embed_32"] = resampled("dinov2", positions, 512)
    found["pos_embed14_to_16"] = resampled("mocov3", case.inputs["pos_embed14"], 256)
    return found


@kind("repa.data_ops")
def data_ops(case: Case) -> dict[str, Tensor]:
    config = case.config
    only_keys(config, ("crop_sizes", "scale", "ema_decay", "ema_updates"))
    found = {}
    for name, size in config["crop_sizes"].items():
        image = PIL.Image.fromarray(case.inputs[f"img_{name}"].numpy().astype(np.uint8))
        found[f"crop_{name}"] = torch.from_numpy(np.array(center_crop(image, size))).long()
    norm = ScaleShift(config["scale"])
    for name, posterior in (("std", from_std), ("logvar", from_log_variance)):
        found[f"z_{name}"] = norm.normalize(posterior(case.inputs[f"moments_{name}"]).sample(case.inputs["n"]))
    live, averaged = (
        nn.ParameterDict({k.removeprefix(prefix): v for k, v in case.weights.items() if k.startswith(prefix)})
        for prefix in ("model.", "ema.")
    )
    ema = EMA(averaged, config["ema_decay"])
    for update in range(config["ema_updates"]):
        ema.update(live, update)
    return {**found, **{f"ema_{name}": value.detach() for name, value in ema.module.items()}}


def read(family: str, held: Mapping[str, Tensor], architecture: Mapping[str, Any], **sides: int) -> ViTEncoder:
    """An encoder of a family whose weights come from a file."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_file({name: value.contiguous() for name, value in held.items()}, file)
        return ViTEncoder(card_of(family), weights=str(file), architecture=architecture, **sides)


def prepare(family: str, image: Tensor) -> Tensor:
    """What an encoder sees of an image of values 0 to 255."""
    return input_for(card_of(family), image.shape[-1])(to_unit(image))


def resampled(family: str, positions: Tensor, image_size: int) -> Tensor:
    """The position table that an encoder for this image side holds after reading one of another grid."""
    card, dim = card_of(family), positions.shape[-1]
    sizes = {**card.architecture, "embed_dim": dim, "depth": 1, "num_heads": 1, "mlp_ratio": 1}
    donor = timm.create_model(card.timm, num_classes=0, img_size=card.patch, **sizes)
    encoder = read(family, {**donor.state_dict(), "pos_embed": positions}, sizes, image_size=image_size)
    return encoder.network.pos_embed.detach()
