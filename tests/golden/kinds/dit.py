"""DiT (facebookresearch/DiT). Its step k is the house's time (k + 1) / 1000."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.backbones.clocks import StepClock
from repalign.backbones.dit import DiT
from repalign.checkpoints.dit import DiTAdapter
from repalign.errors import unknown_choice
from repalign.guidance.cfg import guide
from repalign.objectives.denoising import Denoising
from repalign.objectives.variational import VariationalDenoising
from repalign.paths.parametrization import Noise
from repalign.paths.time import UniformSteps
from repalign.paths.vp import DiscreteVPPath
from repalign.protocols import Sampler
from repalign.samplers.ddim import DDIM
from repalign.samplers.ddpm import DDPM
from repalign.state import Cond, Draw, Output
from tests.golden.building import build_network, collect_gradients, guided_field, recorded_noise
from tests.golden.runner import Case, kind, only_keys

GUIDED_CHANNELS = 3  # of 4: the oddity of the official forward_with_cfg
CHAIN_KEYS = ("respacing", "schedule", "steps")


def build(config: Mapping[str, Any], case: Case) -> DiT:
    """The network behind no clock."""
    return build_network(config, DiTAdapter().from_official(case.weights)["backbone"])


def chain(config: Mapping[str, Any]) -> DiscreteVPPath:
    """The official process: 1000 linear betas unless the config says otherwise."""
    return DiscreteVPPath(config.get("steps", 1000), config.get("schedule", "linear"), config.get("respacing", ""))


def joined(output: Output) -> Tensor:
    """Prediction and variance as the official output has them, along the channels."""
    heads = [output.heads["variance"]] if "variance" in output.heads else []
    return torch.cat([output.pred, *heads], 1)


@kind("dit.forward")
def forward(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "cfg_scale"))
    backbone, inputs = StepClock(build(case.config["model"], case), 1000), case.inputs

    def call(x: Tensor, step: Tensor, label: Tensor) -> Output:
        return backbone(x, (step + 1).float() / 1000, Cond(label=label))

    half = inputs["xcfg"][: len(inputs["xcfg"]) // 2]
    with torch.no_grad():
        out = joined(call(inputs["x"], inputs["t"], inputs["y"]))
        both = joined(call(torch.cat([half, half]), inputs["tcfg"], inputs["ycfg"]))
    cond, null = both.chunk(2)
    guided = guide(cond, null, case.config["cfg_scale"], GUIDED_CHANNELS)
    # The official function also returns the null half, whose unguided channels are its own.
    null_half = torch.cat([guided[:, :GUIDED_CHANNELS], null[:, GUIDED_CHANNELS:]], 1)
    return {"out": out, "cfg": torch.cat([guided, null_half])}


@kind("dit.loss")
def loss(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "grads", *CHAIN_KEYS))
    config, inputs = case.config, case.inputs
    path = chain(config)
    network = build(config["model"], case)
    objective = VariationalDenoising if config["model"].get("learn_sigma", False) else Denoising
    draw = Draw(t=path.times[inputs["t"]].float(), eps=inputs["noise"])
    step = objective(path, Noise(), UniformSteps(path.steps))(
        StepClock(network, path.steps), inputs["x_start"], Cond(label=inputs["y"]), draw
    )
    out = {"mse": step.losses["denoising"], "loss": torch.stack(list(step.losses.values())).sum(0)}
    parts = {"grad": out["loss"]}
    if "variational" in step.losses:
        out["vb"] = parts["grad_vb"] = step.losses["variational"]
    for name, part in parts.items():
        official = DiTAdapter().to_official({"backbone": collect_gradients(network, part.mean())})
        # Every weight is offered under grad_vb too; the case says which of them it compares.
        keys = config["grads"] if name == "grad" else official
        out |= {f"{name}/{key}": official[key] for key in keys}
    return out


RUN_KEYS = ("sampler", "cfg_scale", "clip", *CHAIN_KEYS)


def _ddpm(run: Mapping[str, Any], learned: bool) -> Sampler:
    only_keys(run, (*RUN_KEYS, "sigma_small"), "DDPM run")
    fixed = "fixed_small" if run.get("sigma_small", False) else "fixed_large"
    return DDPM(run.get("respacing", ""), "learned" if learned else fixed, run.get("clip", False))


def _ddim(run: Mapping[str, Any], learned: bool) -> Sampler:
    only_keys(run, (*RUN_KEYS, "eta"), "DDIM run")
    return DDIM(run.get("respacing", ""), run.get("eta", 0.0), run.get("clip", False))


SAMPLERS = {"ddpm": _ddpm, "ddim": _ddim}


@kind("dit.samplers")
def samplers(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "runs"))
    config, inputs, out = case.config, case.inputs, {}
    network, batch = build(config["model"], case), len(inputs["z"])
    label, null = inputs["y_cfg"][:batch], inputs["y_cfg"][batch:]
    for name, run in config["runs"].items():
        if run["sampler"] not in SAMPLERS:
            raise unknown_choice("sampler", run["sampler"], SAMPLERS, "sampler")
        sampler = SAMPLERS[run["sampler"]](run, config["model"].get("learn_sigma", False))
        path = chain({key: value for key, value in run.items() if key != "respacing"})
        scale = run.get("cfg_scale", 1.0)
        field = guided_field(
            StepClock(network, path.steps),
            path,
            Noise(),
            label if scale > 1 else inputs["y"],
            null,
            scale,
            channels=GUIDED_CHANNELS,
        )
        with torch.no_grad():
            out[name] = sampler(field, inputs["z"], recorded_noise(inputs["noise"], batch))
    return out


@kind("dit.schedules")
def schedules(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("respacings",))
    out = {}
    for name, config in case.config["respacings"].items():
        only_keys(config, (*CHAIN_KEYS, "short"), "schedule")
        path = chain(config)
        posterior = path.posterior(torch.arange(len(path)))
        entries = {
            "betas": path.betas,
            "alphas_cumprod": path.alphas_cumprod,
            "timestep_map": path.timestep_map,
            "posterior_variance": posterior.variance,
            "posterior_log_variance_clipped": posterior.log_variance,
            "posterior_mean_coef1": posterior.weight_x_0,
            "posterior_mean_coef2": posterior.weight_x_t,
        }
        out |= {f"{name}/{key}": value for key, value in entries.items()}
    return out
