"""REPA-E (End2End-Diffusion/REPA-E): batch-normalised latents, and the whole joint training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repalign.autoencoders.discriminator import PatchDiscriminator
from repalign.autoencoders.kl_keys import to_house
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.running_norm import RunningStatistics
from repalign.autoencoders.weights import load_exactly
from repalign.checkpoints.repa_e import REPAEAdapter
from repalign.conditioners.label import LabelConditioner
from repalign.objectives.adversarial import Adversarial
from repalign.objectives.denoising import Denoising
from repalign.objectives.first_stage import FirstStage
from repalign.objectives.reconstruction import Reconstruction
from repalign.objectives.regularizers import KLRegularizer
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.protocols import Randomness
from repalign.state import Cond
from repalign.training.ema import EMA
from repalign.training.end_to_end import EndToEnd
from repalign.training.phase import Phase, only
from repalign.training.step import draw_of, losses_at, total_of
from tests.golden.building import PATHS, RecordedRandom
from tests.golden.kinds.kl_autoencoders import sizes_of_ldm
from tests.golden.kinds.repa import REPAParts
from tests.golden.runner import Case, kind, only_keys

MODEL_EXTRA = ("bn_momentum",)
LOSS_KEYS = (
    "discriminator_start discriminator_factor discriminator_weight quantizer_weight perceptual_loss perceptual_weight "
    "reconstruction_loss reconstruction_weight lecam_regularization_weight kl_weight logvar_init"
).split()


class _Denoiser(REPAParts):
    """REPA's backbone and aligners as REPA-E trains them: with positions, and a latent norm."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], weight: float) -> None:
        trunk = {key: value for key, value in weights.items() if not key.startswith("bn.")}
        super().__init__(config, trunk, weight, extra_keys=MODEL_EXTRA, train_positions=True)
        self.norm = RunningStatistics(config["in_channels"], momentum=config.get("bn_momentum", 0.1))
        held = {key.removeprefix("bn."): value for key, value in weights.items() if key.startswith("bn.")}
        if held:
            self.norm.load_state_dict(held)
        self.classes = config["num_classes"]
        self.conditioner = LabelConditioner(self.classes, drop=config.get("class_dropout_prob", 0.1))

    @property
    def averaged(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone, "aligners": self.aligners, "norm": self.norm})

    def batch(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"label": inputs["y"], **{f"features/{k}": inputs[f"z_{k}"] for k in self.encoders}}

    def draws(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"t": inputs["time"].flatten(), "eps": inputs["noise"], "drop/label": inputs["drop_u"]}


@kind("repa_e.sit_bn")
def sit_bn(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "path_type", "proj_coeff", "grads"))
    config, inputs = case.config, case.inputs
    sit = _Denoiser(config["model"], case.weights, config["proj_coeff"])
    sit.norm = RunningStatistics(
        config["model"]["in_channels"],
        momentum=config["model"].get("bn_momentum", 0.1),
        initial=ScaleShift(inputs["latents_scale"].tolist(), inputs["latents_bias"].tolist()),
    )
    out = {f"init_bn/{name}": getattr(sit.norm, name).clone() for name in ("running_mean", "running_var")}
    objective = Denoising(PATHS[config["path_type"]](), Velocity(), Uniform())
    batch, random = sit.batch(inputs), RecordedRandom(len(inputs["y"]), sit.draws(inputs), {})
    parts: dict[str, Any] = {"backbone": sit.backbone, "objective": objective, "conditioner": sit.conditioner}
    depth = config["model"]["encoder_depth"]
    parts |= {"aligners": dict(sit.aligners.items()), "encoders": sit.encoders, "batch": batch}
    draw = draw_of(objective, sit.conditioner, inputs["z"], random)
    trains = Phase(trains=(), evals=("sit", "norm"), optimizer=_adamw)

    z = inputs["z"].clone().requires_grad_()
    with only(trains, {"sit": sit, "norm": sit.norm}):
        undropped = type(draw)(draw.t, draw.eps)
        terms = losses_at(undropped, x_0=sit.norm.normalize(z), only_taps=True, **parts)
        out["align/proj_loss"] = _alignment(terms).reshape(1)
        out["align/grad_z"] = torch.autograd.grad(_alignment(terms), z)[0]

    sit.train()
    x_0 = sit.norm.normalize(inputs["z"])
    terms = losses_at(draw, x_0=x_0, **parts)
    gradients = sit.official_gradients(total_of(terms, parts["aligners"]))
    out |= {f"diff/grad/{key}": gradients[key] for key in config["grads"]}
    out["diff/proj_loss"] = _alignment(terms).reshape(1)
    out |= _pass(sit, objective, x_0, draw, inputs["y"], depth, "diff/")
    out |= {f"diff/{name}": getattr(sit.norm, name).clone() for name in ("running_mean", "running_var")}
    out |= {"stats/scale": sit.norm.scale.reshape(1, -1, 1, 1), "stats/bias": sit.norm.bias.reshape(1, -1, 1, 1)}
    out = {k: v.flatten() if k.startswith("stats/") else v for k, v in out.items()}

    sit.eval()
    with torch.no_grad():
        out["decode_input"] = sit.norm.denormalize(inputs["x_inf"])
        out["inference"] = sit.backbone(inputs["x_inf"], inputs["t_inf"], Cond(label=inputs["y"])).pred
    sit.backbone.train()  # the second stage: the network trains on fixed statistics
    with torch.no_grad():
        out |= _pass(sit, objective, sit.norm.normalize(inputs["z"]), draw, inputs["y"], depth, "ldm_only/")
    return out | {f"ldm_only/{name}": getattr(sit.norm, name) for name in ("running_mean", "running_var")}


def _pass(
    sit: _Denoiser, objective: Denoising, x_0: Tensor, draw: Any, labels: Tensor, depth: int, prefix: str
) -> dict[str, Tensor]:
    tap = f"block.{depth}"
    with torch.no_grad():
        step = objective(sit.backbone, x_0, sit.conditioner({"label": labels}, draw.drop), draw, taps=(tap,))
        heads = {f"{prefix}zs_tilde_{k}": a.head(step.output.taps[tap].data) for k, a in sit.aligners.items()}
    return {**heads, f"{prefix}denoising_loss": step.losses["denoising"], f"{prefix}model_output": step.output.pred}


def _alignment(terms: Mapping[str, Tensor]) -> Tensor:
    """REPA-E averages over its encoders."""
    return torch.stack([value for name, value in terms.items() if name.startswith("align/")]).mean()


def _squared_distance(target: Tensor, output: Tensor) -> Tensor:
    """What the case puts in the place of LPIPS."""
    return (target - output).square().flatten(1).mean(1)


def _first_stage(losses: Mapping[str, Any], discriminator: PatchDiscriminator) -> FirstStage:
    only_keys(losses, LOSS_KEYS, "losses")
    if losses.get("lecam_regularization_weight", 0.0) != 0:
        raise KeyError("losses: LeCam regularisation is not supported; REPA-E gives it weight 0")
    pixel = {"l1": "l1", "l2": "mse"}[losses["reconstruction_loss"]]
    return FirstStage(
        reconstruction=Reconstruction(
            regularizer=KLRegularizer(weight=losses["kl_weight"]),
            **{"l1": 0.0, "mse": 0.0, pixel: losses["reconstruction_weight"]},
            perceptual=_squared_distance,
            perceptual_weight=losses["perceptual_weight"],
            log_variance=losses["logvar_init"],
        ),
        adversarial=Adversarial(
            discriminator=discriminator,
            weight=losses["discriminator_weight"],
            adaptive=False,
            factor=losses["discriminator_factor"],
            start=losses["discriminator_start"],
        ),
    )


_adamw: Callable[..., torch.optim.Optimizer] = partial(
    torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
)


@kind("repa_e.train_step")
def train_step(case: Case) -> dict[str, Tensor]:
    only_keys(
        case.config,
        "model vae losses ndf global_step vae_align_proj_coeff proj_coeff grads_vae grads_disc grads_sit".split(),
    )
    config, inputs, out = case.config, case.inputs, {}
    below = {
        p: {k[len(p) + 1 :]: v for k, v in case.weights.items() if k.startswith(p)} for p in ("sit", "vae", "disc")
    }
    sit = _Denoiser(config["model"], below["sit"], config["proj_coeff"])
    vae = SDAutoencoder(weights="random", norm=sit.norm, **sizes_of_ldm(config["vae"]))
    load_exactly(vae, to_house(below["vae"]), "golden")
    discriminator = PatchDiscriminator(config["ndf"])
    load_exactly(discriminator, below["disc"], "golden")
    parts: dict[str, nn.Module] = {"autoencoder": vae, "discriminator": discriminator, **dict(sit.averaged.items())}
    ema = EMA(sit.averaged, 0.9999)
    joint = EndToEnd(
        first_stage=_first_stage(config["losses"], discriminator),
        objective=Denoising(PATHS["linear"](), Velocity(), Uniform()),
        conditioner=sit.conditioner,
        aligners=dict(sit.aligners.items()),
        encoders=sit.encoders,
        alignment=config["vae_align_proj_coeff"],
    )
    for part in parts.values():
        part.train()
    random: Randomness = RecordedRandom(len(inputs["y"]), {**sit.draws(inputs), "posterior": inputs["n"]}, {})
    batch = {**sit.batch(inputs), "image": inputs["image"]}
    shared = joint.begin(vae, batch, random)
    step = config["global_step"]
    phases = {
        "vae": (("autoencoder",), lambda: joint.autoencoder_loss(shared, vae, sit.norm, sit.backbone, step)),
        "disc": (("discriminator",), lambda: joint.discriminator_loss(shared, step)),
        "sit": (("backbone", "aligners"), lambda: joint.denoiser_loss(shared, sit.norm, sit.backbone)),
    }
    adapter = REPAEAdapter(list(sit.aligners), config["model"]["encoder_depth"])
    for name, (trains, loss_of) in phases.items():
        evals = ("backbone", "aligners", "norm") if name == "vae" else ()
        phase = Phase(trains=trains, evals=evals, optimizer=_adamw, clip=1.0)
        trained = [p for part in trains for p in parts[part].parameters() if p.requires_grad]
        with only(phase, parts):
            losses = loss_of()
            losses.total.backward()
        gradients = adapter.to_official(_gradients(parts, sit))
        prefix = {"vae": "vae.", "disc": "discriminator.", "sit": ""}[name]
        out |= {f"{name}/grad/{key}": gradients[prefix + key].clone() for key in config[f"grads_{name}"]}
        out[f"{name}/grad_norm"] = nn.utils.clip_grad_norm_(trained, phase.clip or float("inf")).reshape(1)
        phase.optimizer(trained).step()
        for part in parts.values():
            part.zero_grad(set_to_none=True)
        out |= _scalars(name, losses.terms, losses.total, config["losses"])
    ema.update(sit.averaged, 0)
    reconstructed = shared.reconstructed
    with torch.no_grad():
        out |= {"z": reconstructed.latent, "recon": reconstructed.output}
        out |= {f"disc/buffer/{key}": value for key, value in discriminator.named_buffers()}
        out |= {f"sit/bn.{key}": value for key, value in sit.norm.named_buffers()}
    out |= {"sit/denoising_loss": _denoising_losses(joint, sit, below["sit"], shared, config)}
    stage = {"autoencoder": _own(_state(vae)), "discriminator": _state(discriminator)}
    after = adapter.to_official({**_parts(sit), **stage})
    averaged = adapter.to_official(_parts(sit, ema.module))
    renamed = {"vae.": "vae.", "discriminator.": "disc."}
    for key, value in after.items():
        prefix = next((p for p in renamed if key.startswith(p)), "")
        out[f"after/{renamed.get(prefix, 'sit.')}{key.removeprefix(prefix)}"] = value
    return out | {f"ema/{key}": value for key, value in averaged.items()}


def _denoising_losses(
    joint: EndToEnd, sit: _Denoiser, weights: Mapping[str, Tensor], shared: Any, config: Mapping[str, Any]
) -> Tensor:
    """[B], of the third phase's pass: the terms are its means, so the network from before the step runs once more."""
    before = _Denoiser(config["model"], weights, config["proj_coeff"])
    before.norm.train()
    with torch.no_grad():
        x_0 = before.norm.normalize(shared.reconstructed.latent)
        cond = sit.conditioner(shared.batch, shared.draw.drop)
        assert isinstance(joint.objective, Denoising)
        return joint.objective(before.backbone, x_0, cond, shared.draw).losses["denoising"]


def _scalars(phase: str, terms: Mapping[str, Tensor], total: Tensor, losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """The official names of logged numbers."""
    terms = {name.removeprefix("autoencoder/").removeprefix("discriminator/"): term for name, term in terms.items()}
    if phase == "disc":
        found = {"loss": total, "logits_real_mean": terms["logits_real"], "logits_fake_mean": terms["logits_fake"]}
    elif phase == "sit":
        found = {"proj_loss": _alignment(terms)}
    else:
        pixel = {"l1": "l1", "l2": "mse"}[losses["reconstruction_loss"]]
        gan = terms["adversarial"]
        found = {
            "total": total,
            "align_proj_loss": _alignment(terms),
            "reconstruction_loss": terms[pixel],
            "perceptual_loss": terms["perceptual"],
            "kl_loss": losses["kl_weight"] * terms["kl"],
            "gan_loss": gan,
            "weighted_gan_loss": losses["discriminator_factor"] * losses["discriminator_weight"] * gan,
        }
    return {f"{phase}/{name}": value.detach().reshape(1) for name, value in found.items()}


def _gradients(parts: Mapping[str, nn.Module], sit: _Denoiser) -> dict[str, dict[str, Tensor]]:
    def of(module: nn.Module) -> dict[str, Tensor]:
        named = module.named_parameters()
        return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in named}

    heads = {f"aligners.{name}.head": of(aligner.head) for name, aligner in sit.aligners.items()}
    return {
        "backbone": of(sit.backbone),
        **heads,
        "autoencoder": _own(of(parts["autoencoder"])),
        "discriminator": of(parts["discriminator"]),
    }


def _parts(sit: _Denoiser, averaged: nn.Module | None = None) -> dict[str, dict[str, Tensor]]:
    owner = sit.averaged if averaged is None else averaged
    assert isinstance(owner, nn.ModuleDict)
    heads = {f"aligners.{name}.head": _state(owner["aligners"][name].head) for name in sit.aligners}
    return {"backbone": _state(owner["backbone"]), "norm": _state(owner["norm"]), **heads}


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith("norm.")}


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
