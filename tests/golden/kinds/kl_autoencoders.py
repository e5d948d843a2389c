"""KL autoencoders of LDM, diffusers, SD3 and REPA-E behind :class:`repalign.autoencoders.kl_vae.SDAutoencoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.autoencoders.kl_keys import to_house
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.posterior import from_log_variance
from repalign.autoencoders.weights import load_exactly
from repalign.objectives.regularizers import kl_divergence
from tests.golden.runner import Case, kind, only_keys


def build(case: Case, norm: ScaleShift, **sizes: Any) -> SDAutoencoder:
    autoencoder = SDAutoencoder(weights="random", norm=norm, **sizes)
    load_exactly(autoencoder, to_house(case.weights), "golden")
    return autoencoder.eval()


def sizes_of_ldm(config: Mapping[str, Any]) -> dict[str, Any]:
    """LDM names levels with attention by their nominal resolution."""
    levels = range(len(config["ch_mult"]))
    attends = [level for level in levels if config["resolution"] // 2**level in config.get("attn_resolutions", ())]
    return {
        "channels": config.get("embed_dim", config["z_channels"]),
        "z_channels": config["z_channels"],
        "widths": [config["ch"] * factor for factor in config["ch_mult"]],
        "depth": config["num_res_blocks"],
        "groups": config.get("norm_groups", 32),
        "attention_levels": attends,
    }


@torch.no_grad()
def forward(autoencoder: SDAutoencoder, image: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """Every quantity that one of the kinds asks for; pictures are in [-1, 1]."""
    moments = autoencoder.moments(image)
    posterior = from_log_variance(moments)
    assert posterior.std is not None
    sample = posterior.sample(noise)
    return {
        "moments": moments,
        "mean": posterior.mean,
        "std": posterior.std,
        "logvar": moments.chunk(2, dim=1)[1].clamp(-30, 20),
        "sample": sample,
        "reconstruction": autoencoder.decode_unclamped(sample),
        "mode_reconstruction": autoencoder.decode_unclamped(posterior.mean),
        "kl_per_sample": kl_divergence(posterior).flatten(1).sum(1),
        "scale_factor_by_std": 1 / sample.std(),
    }


@kind("ldm.kl_autoencoder")
def ldm_kl_autoencoder(case: Case) -> Mapping[str, Tensor]:
    only_keys(
        case.config,
        "double_z z_channels resolution in_channels out_ch ch ch_mult num_res_blocks attn_resolutions dropout "
        "embed_dim norm_groups".split(),
    )
    if (case.config["in_channels"], case.config["out_ch"], case.config["double_z"]) != (3, 3, True):
        raise KeyError("config: only pictures of three channels and a posterior with a variance are supported")
    autoencoder = build(case, ScaleShift(1.0), **sizes_of_ldm(case.config))
    return forward(autoencoder, case.inputs["image"], case.inputs["noise"])


@kind("ldm.kl_autoencoder_diffusers")
def diffusers_kl_autoencoder(case: Case) -> Mapping[str, Tensor]:
    config = case.config
    only_keys(
        config,
        "block_out_channels layers_per_block latent_channels norm_num_groups down_block_types use_quant_conv".split(),
    )
    levels = enumerate(config.get("down_block_types", ()))
    autoencoder = build(
        case,
        ScaleShift(1.0),
        channels=config["latent_channels"],
        widths=config["block_out_channels"],
        depth=config["layers_per_block"],
        groups=config["norm_num_groups"],
        attention_levels=[level for level, block in levels if block == "AttnDownEncoderBlock2D"],
        quant=config.get("use_quant_conv", True),
    )
    return forward(autoencoder, case.inputs["image"], case.inputs["noise"])


@kind("sd3.vae")
def sd3_vae(case: Case) -> Mapping[str, Tensor]:
    config = case.config
    only_keys(config, ["ch", "ch_mult", "num_res_blocks", "z_channels", "groups", "scale", "shift"])
    norm = ScaleShift(config["scale"], config["shift"])
    autoencoder = build(
        case,
        norm,
        channels=config["z_channels"],
        widths=[config["ch"] * factor for factor in config["ch_mult"]],
        depth=config["num_res_blocks"],
        groups=config["groups"],
        quant=False,
    )
    found = forward(autoencoder, case.inputs["image"], case.inputs["noise"])
    latent = norm.normalize(found["sample"])
    with torch.no_grad():
        found["reconstruction"] = autoencoder.decode_unclamped(norm.denormalize(latent))
    return {**found, "latent_scaled": latent}


@kind("repa_e.vae")
def repa_e_vae(case: Case) -> Mapping[str, Tensor]:
    only_keys(case.config, ["vae"])
    config = case.config["vae"]
    only_keys(
        config,
        "ch ch_mult num_res_blocks attn_resolutions resolution z_channels embed_dim norm_groups".split(),
        "config.vae",
    )
    found = forward(build(case, ScaleShift(1.0), **sizes_of_ldm(config)), case.inputs["x"], case.inputs["n"])
    return {**found, "z": found["sample"], "recon": found["reconstruction"], "kl": found["kl_per_sample"]}
