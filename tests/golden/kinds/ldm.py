"""LDM's schedules and training loss. Its step k is the house's time (k + 1) / 1000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.backbones.clocks import StepClock
from repalign.checkpoints.unet import LDMUNetAdapter
from repalign.errors import unknown_choice
from repalign.objectives.latent_diffusion import LatentDiffusionLoss, bound_weights
from repalign.paths.angular import AngularVelocity
from repalign.paths.parametrization import Data, Noise, Quantity
from repalign.paths.schedules import kept_steps
from repalign.paths.time import UniformSteps
from repalign.paths.vp import DiscreteVPPath
from repalign.samplers.ddim import ddim_steps
from repalign.state import Draw
from repalign.training.schedule import WarmupFrom
from tests.golden.building import collect_gradients
from tests.golden.kinds.ldm_unet import UNET_KEYS, cond_of, unet
from tests.golden.runner import Case, kind, only_keys

# LDM's names of schedules; its "linear" is linear in the square roots.
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2", "sqrt": "sqrt"}
PREDICTIONS: Mapping[str, type[Quantity]] = {"eps": Noise, "x0": Data, "v": AngularVelocity}
CONDITIONINGS = ("crossattn", "concat", "hybrid", "adm", "none", None)


def chain(config: Mapping[str, Any]) -> DiscreteVPPath:
    """The official process of 1000 steps."""
    name = config.get("schedule", "linear")
    if name not in SCHEDULES:
        raise unknown_choice("schedule", name, SCHEDULES)
    ends = None if name == "cosine" else (config["b0"], config["b1"])
    return DiscreteVPPath(config.get("timesteps", 1000), SCHEDULES[name], ends=ends)


@kind("ldm.loss")
def loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    own = "conditioning b0 b1 loss elbo logvar simple schedule timesteps parameterization learn_logvar".split()
    only_keys(config, (*UNET_KEYS, *own))
    if config.get("conditioning") not in CONDITIONINGS:
        raise unknown_choice("conditioning", str(config["conditioning"]), [str(c) for c in CONDITIONINGS])
    network = unet({k: v for k, v in config.items() if k in UNET_KEYS}, case.weights)
    path, prediction = chain(config), PREDICTIONS[config.get("parameterization", "eps")]()
    backbone, draw = StepClock(network, path.steps), Draw(path.times[inputs["t"]].float(), inputs["noise"])

    def losses(**weights: float) -> tuple[dict[str, Tensor], Any]:
        objective = LatentDiffusionLoss(
            path, prediction, UniformSteps(path.steps), distance=config.get("loss", "l2"), **weights
        )
        step = objective(backbone, inputs["x0"], cond_of(inputs), draw)
        return dict(step.losses), step

    weighted, step = losses(
        simple_weight=config.get("simple", 1.0),
        bound_weight=config.get("elbo", 0.0),
        log_variance=config.get("logvar", 0.0),
    )
    total = torch.stack(list(weighted.values())).sum(0).mean()
    plain, _ = losses(bound_weight=1.0)
    sample = step.sample
    gradients = LDMUNetAdapter(network).to_official({"backbone": collect_gradients(network, total)})
    return {
        "x_noisy": sample.x_t,
        "model_out": step.output.pred,
        "x0_from_eps": prediction.data(step.output.pred, sample.x_t, sample.coefficients),
        "loss_simple_per_sample": plain["denoising"],
        "loss_simple": plain["denoising"].mean(),
        "loss_vlb": plain["variational"].mean(),
        "loss": total,
        **{f"grad/{key}": value for key, value in gradients.items()},
    }


@kind("ldm.schedules")
def schedules(case: Case) -> dict[str, Tensor]:
    config, index = case.config, case.inputs["idx"]
    only_keys(config, "sets ddim_S ddim_schedule lr_steps lr_warmup_cosine lr_linear_warmup".split())
    out: dict[str, Tensor] = {}
    for entry in config["sets"]:
        only_keys(entry, ("schedule", "b0", "b1"), "set")
        path = chain(entry)
        posterior = path.posterior(index)
        before = torch.cat([torch.ones(1, dtype=torch.float64), path.alphas_cumprod[:-1]])
        tables = {
            "betas": path.betas[index],
            "alphas_cumprod": path.alphas_cumprod[index],
            "alphas_cumprod_prev": before[index],
            "lvlb_weights": bound_weights(path, Noise())[index],
            # Where ours repeats the second step, LDM has the logarithm of a floor.
            "posterior_log_variance_clipped": posterior.variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": posterior.weight_x_0,
            "posterior_mean_coef2": posterior.weight_x_t,
            "posterior_variance": posterior.variance,
            "sqrt_recipm1_alphas_cumprod": (1 / path.alphas_cumprod[index] - 1).sqrt(),
        }
        out |= {f"{entry['schedule']}_{entry['b0']}_{entry['b1']}/{name}": value for name, value in tables.items()}
    whole = chain(config["ddim_schedule"])
    for count in config["ddim_S"]:
        for name, spec in (("uniform", f"ldm{count}"), ("quad", f"ldm_quad{count}")):
            key = f"ddim_{name}_S{count}"
            out[f"{key}_steps"] = torch.tensor(kept_steps(whole.steps, spec))
            for eta in (0.0, 1.0):
                steps = ddim_steps(whole, spec, eta, end="first_step")
                out |= {
                    f"{key}_alphas": steps.alpha_bar,
                    f"{key}_alphas_prev": steps.alpha_bar_before,
                    f"{key}_eta{eta}_sigmas": steps.spread,
                }
    return out | learning_rates(config)


def learning_rates(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Factors of both schedulers; their numbers are in words, "warm_up 100, f_max=f_min=1, ..."."""
    names = {
        **{"warm_up": "warmup", "lr_start": "start", "lr_max": "high", "lr_min": "low", "max_decay": "cycle"},
        **{"f_start": "start", "f_max": "high", "f_min": "low", "cycle": "cycle"},
    }
    out = {}
    for key, decay in (("lr_warmup_cosine", "cosine"), ("lr_linear_warmup", "linear")):
        options: dict[str, Any] = {}
        for part in config[key].split(","):
            *found, value = part.replace("=", " ").split()
            options |= {names[name]: float(value) for name in found}
        schedule = WarmupFrom(decay=decay, **options)
        out[key] = torch.tensor([schedule(step) for step in config["lr_steps"]], dtype=torch.float64)
    return out
