"""First stages of LDM and REPA-E: VQ autoencoder, losses with their gradients, LPIPS arithmetic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repalign.autoencoders.discriminator import PatchDiscriminator
from repalign.autoencoders.kl_keys import to_house
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.vq import VQAutoencoder
from repalign.autoencoders.vq_keys import from_ldm, to_ldm
from repalign.autoencoders.weights import load_exactly
from repalign.metrics.lpips import LPIPS, lpips_distance
from repalign.objectives.adversarial import Adversarial
from repalign.objectives.first_stage import FirstStage
from repalign.objectives.reconstruction import Reconstruction
from repalign.objectives.regularizers import CodebookRegularizer, KLRegularizer, Regularizer
from tests.golden.building import RecordedRandom, collect_gradients
from tests.golden.kinds.kl_autoencoders import sizes_of_ldm
from tests.golden.runner import Case, kind, only_keys

NETWORK_KEYS = (
    "double_z z_channels resolution in_channels out_ch ch ch_mult num_res_blocks attn_resolutions dropout embed_dim "
    "norm_groups"
).split()
CODEBOOK_KEYS = ["n_embed", "beta", "legacy"]
LOSS_KEYS = (
    "disc_ndf disc_num_layers disc_start disc_weight disc_factor disc_loss disc_in_channels disc_conditional "
    "use_actnorm perceptual perceptual_weight pixelloss_weight step"  # the official losses ignore pixelloss_weight
).split()


def check_networks(config: Mapping[str, Any], double_z: bool, training: bool) -> None:
    if (config.get("in_channels", 3), config.get("out_ch", 3), config.get("disc_in_channels", 3)) != (3, 3, 3):
        raise KeyError("config: only pictures of three channels are supported")
    if config.get("disc_conditional", False) or config.get("use_actnorm", False):
        raise KeyError("config: conditional discriminators and activation norms are not supported")
    if config.get("double_z", double_z) != double_z:
        raise KeyError(f"config.double_z: expected {double_z} for this kind")
    if training and config.get("dropout", 0.0) != 0:
        raise KeyError("config.dropout: these autoencoders have none")


def build_vq(case: Case) -> VQAutoencoder:
    config = case.config
    autoencoder = VQAutoencoder(
        weights="random",
        norm=ScaleShift(1.0),
        codes=config["n_embed"],
        beta=config.get("beta", 0.25),
        legacy=config.get("legacy", True),
        **sizes_of_ldm(config),
    )
    load_exactly(autoencoder, from_ldm(without_losses(case.weights)), "golden")
    return autoencoder


def build_kl(case: Case) -> SDAutoencoder:
    autoencoder = SDAutoencoder(weights="random", norm=ScaleShift(1.0), **sizes_of_ldm(case.config))
    load_exactly(autoencoder, to_house(without_losses(case.weights)), "golden")
    return autoencoder


def without_losses(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in weights.items() if not key.startswith("loss.")}


def below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def official_gradients(prefix: str, module: nn.Module, of: Tensor) -> dict[str, Tensor]:
    """Gradients by the official names, wherever in our module the networks lie."""
    found = {
        re.sub(r"^.*?(?=(?:encoder|decoder|quant_conv|post_quant_conv|quantizer)\.)", "", name, count=1): gradient
        for name, gradient in collect_gradients(module, of).items()
    }
    return {f"{prefix}/{name}": gradient for name, gradient in to_ldm(found).items()}


@kind("ldm.vq_autoencoder")
def vq_autoencoder(case: Case) -> Mapping[str, Tensor]:
    only_keys(case.config, [*NETWORK_KEYS, *CODEBOOK_KEYS])
    check_networks(case.config, double_z=False, training=False)
    autoencoder = build_vq(case).eval()
    raw = autoencoder.encode((case.inputs["image"] + 1) / 2).mean
    codes = autoencoder.quantize(raw)
    reconstruction = autoencoder.decode_quantized(codes.latent)
    codebook = codes.loss.mean()
    usage = autoencoder.code_usage(codes.indices)
    return {
        "prequant": raw,
        "quantized": codes.latent,
        "indices": codes.indices.flatten(),
        "codebook_loss": codebook,
        "reconstruction": reconstruction,
        "perplexity": usage["perplexity"],
        "cluster_usage": usage["codes_used"],
        **official_gradients("grad", autoencoder, codebook + reconstruction.square().mean()),
    }


class StandIn(nn.Module):
    """The small convolution that these cases have in the place of LPIPS."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = (nn.functional.conv2d(x, self.weight, stride=2, padding=1) for x in (first, second))
        return (a - b).square().flatten(1).mean(1)


def first_stage_losses(
    case: Case, autoencoder: nn.Module, regularizer: Regularizer, reduction: str, log_variance: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """Both losses with their gradients, and what the official code logs."""
    config, step = case.config, case.config["step"]
    perceptual = StandIn(case.weights["loss.perceptual_loss.conv.weight"])
    perceptual_weight = config.get("perceptual_weight", 1.0)
    discriminator = PatchDiscriminator(config.get("disc_ndf", 64), config.get("disc_num_layers", 3))
    discriminator.load_state_dict(below("loss.discriminator.", case.weights))
    pixels = {"l1": {"l1": 1.0, "mse": 0.0}, "l2": {"l1": 0.0, "mse": 1.0}}[config.get("pixel_loss", "l1")]
    reconstruction = Reconstruction(
        regularizer=regularizer,
        perceptual=perceptual if perceptual_weight > 0 else None,
        perceptual_weight=perceptual_weight,
        reduction=reduction,
        log_variance=log_variance,
        **pixels,
    )
    adversarial = Adversarial(
        discriminator=discriminator,
        weight=config.get("disc_weight", 1.0),
        factor=config.get("disc_factor", 1.0),
        start=config["disc_start"],
        loss=config.get("disc_loss", "hinge"),
    )
    stage = FirstStage(reconstruction=reconstruction, adversarial=adversarial)
    image = case.inputs["image"]
    random = RecordedRandom(len(image), {"posterior": case.inputs.get("noise", torch.empty(0))}, {})
    shared = stage.reconstruct(autoencoder, (image + 1) / 2, random)
    generator = stage.autoencoder_loss(autoencoder, shared, step)
    judge = stage.discriminator_loss(shared, step)
    # The official code logs the adversarial term before its start, too, where it has no effect.
    g_loss = adversarial.generator_loss(shared.output).mean()
    d_weight = adversarial.weight_of(shared.nll.mean(), g_loss, autoencoder.last_layer)
    weighted = [w * shared.losses[name].mean() for name, w in reconstruction.weights.items() if name in shared.losses]
    return {
        "reconstruction": shared.output,
        "perceptual": perceptual(shared.target, shared.output).reshape(-1, 1, 1, 1),
        "generator_loss": generator.total,
        "discriminator_loss": judge.total,
        **official_gradients("grad_gen", autoencoder, generator.total),
        **{
            f"grad_disc/loss.discriminator.{name}": gradient
            for name, gradient in collect_gradients(discriminator, judge.total).items()
        },
        "log/total_loss": generator.total,
        "log/nll_loss": shared.nll.mean(),
        "log/rec_loss": torch.stack(weighted).sum(),
        "log/p_loss": shared.losses.get("perceptual", torch.zeros(1)).mean(),
        "log/g_loss": g_loss,
        "log/d_weight": d_weight,
        "log/disc_factor": torch.tensor(adversarial.factor_at(step)),
        "log/disc_loss": judge.total,
        "log/logits_real": judge.terms["logits_real"],
        "log/logits_fake": judge.terms["logits_fake"],
        "log/logvar": torch.as_tensor(log_variance),
        **{f"log/{name}_loss": shared.losses[key].mean() for name, key in OFFICIAL.items() if key in shared.losses},
    }


OFFICIAL = {"kl": "kl", "quant": "codebook"}


@kind("ldm.kl_loss")
def kl_loss(case: Case) -> Mapping[str, Tensor]:
    only_keys(case.config, [*NETWORK_KEYS, *LOSS_KEYS, "kl_weight", "logvar"])
    check_networks(case.config, double_z=True, training=True)
    log_variance = case.weights.get("loss.logvar", torch.tensor(case.config.get("logvar", 0.0)))
    regularizer = KLRegularizer(weight=case.config.get("kl_weight", 1.0))
    found = first_stage_losses(case, build_kl(case).train(), regularizer, "sum", log_variance)
    if case.config.get("disc_factor", 1.0) == 0:  # the KL loss, other than the VQ loss, does not compute it then
        found["log/d_weight"] = torch.zeros(())
    return found


@kind("ldm.vq_loss")
def vq_loss(case: Case) -> Mapping[str, Tensor]:
    only_keys(case.config, [*NETWORK_KEYS, *CODEBOOK_KEYS, *LOSS_KEYS, "codebook_weight", "pixel_loss"])
    check_networks(case.config, double_z=False, training=True)
    regularizer = CodebookRegularizer(weight=case.config.get("codebook_weight", 1.0))
    return first_stage_losses(case, build_vq(case).train(), regularizer, "mean")


@kind("repa_e.lpips")
def repa_e_lpips(case: Case) -> Mapping[str, Tensor]:
    only_keys(case.config, ["channels", "double_scaling"])
    lpips = LPIPS(vgg="random", heads="random", double_scaling=case.config["double_scaling"])
    layers = range(len(case.config["channels"]))
    heads = [case.weights[f"lin{n}.model.1.weight"].flatten() for n in layers]
    features = [[case.inputs[f"{picture}{n}"] for n in layers] for picture in "ab"]
    return {
        "scaled_a": lpips.scaled(case.inputs["img_a"]),
        "scaled_b": lpips.scaled(case.inputs["img_b"]),
        "value": lpips_distance(*features, heads).reshape(-1, 1, 1, 1),
    }
