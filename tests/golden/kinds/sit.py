"""SiT (willisma/SiT). Its time runs from noise (0) to data (1): t_sit = 1 - t, v_sit = -v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.backbones.clocks import ReversedClock
from repalign.backbones.dit import DiT
from repalign.checkpoints.dit import DiTAdapter
from repalign.errors import unknown_choice
from repalign.guidance.cfg import guide
from repalign.objectives.denoising import Denoising
from repalign.objectives.weighting import LikelihoodWeight
from repalign.paths.interval import time_interval
from repalign.paths.parametrization import Noise, Quantity, Score, Velocity, linear_drift
from repalign.paths.time import Uniform
from repalign.protocols import Sampler
from repalign.samplers.adaptive import Adaptive
from repalign.samplers.diffusion import diffusion_form
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.heun import Heun
from repalign.state import Cond, Draw, Output
from tests.golden.building import PATHS, PREDICTIONS, build_network, collect_gradients, guided_field, recorded_noise
from tests.golden.runner import Case, kind, only_keys

GUIDED_CHANNELS = 3  # of 4: the oddity of the official forward_with_cfg
# What SiT calls a weight, as (quantity in which the error is measured, weighting); a velocity has none.
WEIGHTS = {None: (Noise(), None), "velocity": (Velocity(), None), "likelihood": (Noise(), LikelihoodWeight())}


def pick(table: Mapping[Any, Any], name: Any, key: str) -> Any:
    """An entry of a table of official names."""
    if name not in table:
        raise unknown_choice(key, str(name), [str(choice) for choice in table])
    return table[name]


def build(config: Mapping[str, Any], case: Case) -> DiT:
    """The network behind no clock."""
    return build_network(config, DiTAdapter().from_official(case.weights)["backbone"])


def objective(path: str, prediction: str, weight: str | None) -> Denoising:
    """SiT's loss of a path, a prediction and a weight."""
    quantity: Quantity = pick(PREDICTIONS, prediction, "prediction")()
    if prediction == "velocity":
        return Denoising(pick(PATHS, path, "path")(), quantity, Uniform())
    error, weighting = pick(WEIGHTS, weight, "weight")
    return Denoising(pick(PATHS, path, "path")(), quantity, Uniform(), weighting, error)


@kind("sit.forward")
def forward(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "cfg_scale"))
    network = build(case.config["model"], case)
    backbone, inputs = ReversedClock(network), case.inputs
    with torch.no_grad():
        v = -backbone(inputs["x"], 1 - inputs["t"], Cond(label=inputs["y"])).pred
        half = inputs["xcfg"][: len(inputs["xcfg"]) // 2]
        both = -backbone(torch.cat([half, half]), 1 - inputs["tcfg"], Cond(label=inputs["ycfg"])).pred
    cond, null = both.chunk(2)
    guided = guide(cond, null, case.config["cfg_scale"], GUIDED_CHANNELS)
    # The official function also returns the null half, whose unguided channels are its own.
    null_half = torch.cat([guided[:, :GUIDED_CHANNELS], null[:, GUIDED_CHANNELS:]], 1)
    return {"v": v, "cfg": torch.cat([guided, null_half]), "pos_embed": network.pos_embed}


@kind("sit.paths")
def paths(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("paths", "forms", "norm"))
    inputs, out = case.inputs, {}
    t = 1 - inputs["t"]
    for name in case.config["paths"]:
        path = pick(PATHS, name, "path")()
        c = path.coefficients(t)
        f, g = linear_drift(c)
        sample = path.sample(x_0=inputs["x1"], eps=inputs["x0"], t=t)
        x, v = inputs["x"], inputs["v"]
        entries = {
            "alpha": c.alpha,
            "sigma": c.sigma,
            "d_alpha": -c.d_alpha,
            "d_sigma": -c.d_sigma,
            "d_alpha_over_alpha": -f,
            "drift_mean": f.reshape(-1, *[1] * (x.ndim - 1)) * x,
            "drift_var": g,
            "score_from_velocity": Velocity().score(-v, x, c),
            "noise_from_velocity": Velocity().noise(-v, x, c),
            "velocity_from_score": -Score().velocity(v, x, c),
            "xt": sample.x_t,
            "ut": -Velocity().target(sample),
        }
        entries |= {
            f"diffusion/{form}": diffusion_form(form, case.config["norm"])(t, c) for form in case.config["forms"]
        }
        out |= {f"{name}/{key}": value for key, value in entries.items()}
    return out


@kind("sit.transport_losses")
def transport_losses(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("paths", "predictions", "weights"))
    inputs, out = case.inputs, {}
    for path in case.config["paths"]:
        for prediction in case.config["predictions"]:
            # A reversed velocity has the other sign; noise and score do not.
            pred = -inputs["pred"] if prediction == "velocity" else inputs["pred"]
            for weight in case.config["weights"]:
                loss = objective(path, prediction, weight)
                train = time_interval(loss.path, loss.parametrization, train=True)
                low, high = 1 - train.high, 1 - train.low
                draw = Draw(t=1 - (inputs["u"] * (high - low) + low), eps=inputs["x0"])
                step = loss(_Constant(pred), inputs["x1"], Cond(), draw)
                out[f"loss/{path}/{prediction}/{weight}"] = step.losses["denoising"]
                out[f"interval/{path}/{prediction}/{weight}"] = _intervals(loss)
    return out


class _Constant:
    """A backbone that predicts the same whatever comes."""

    tap_specs: Mapping[str, Any] = {}
    uses_carry = False

    def __init__(self, pred: Tensor) -> None:
        self.pred = pred

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond, **options: Any) -> Output:
        return Output(self.pred)


def _intervals(loss: Denoising) -> Tensor:
    """Training, ODE, and SDE with last step 0, 0.04, 0, 0.04 (SBDM, then sigma), in SiT's time."""
    path, prediction = loss.path, loss.parametrization
    ode, sde = time_interval(path, prediction), time_interval(path, prediction, last_step_size=0.04)
    every = [time_interval(path, prediction, train=True), ode, ode, sde, ode, sde]
    return torch.tensor([end for i in every for end in (1 - i.high, 1 - i.low)], dtype=torch.float64)


@kind("sit.train_grad")
def train_grad(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "path", "prediction", "weight", "grads"))
    config, inputs = case.config, case.inputs
    loss = objective(config["path"], config["prediction"], config["weight"])
    backbone = ReversedClock(build(config["model"], case), flip_sign=config["prediction"] == "velocity")
    train = time_interval(loss.path, loss.parametrization, train=True)
    low, high = 1 - train.high, 1 - train.low
    draw = Draw(t=1 - (inputs["u"] * (high - low) + low), eps=inputs["x0"])
    losses = loss(backbone, inputs["x1"], Cond(label=inputs["y"]), draw).losses["denoising"]
    gradients = collect_gradients(backbone.backbone, losses.mean())
    official = DiTAdapter().to_official({"backbone": gradients})
    return {"loss": losses, **{f"grad/{key}": official[key] for key in config["grads"]}}


RUN_KEYS = ("mode", "path", "prediction", "method", "num_steps", "cfg_scale", "trace")
SDE_KEYS = (*RUN_KEYS, "form", "norm", "last_step", "last_step_size")
ODE_KEYS = (*RUN_KEYS, "atol", "rtol")


def _sde(run: Mapping[str, Any]) -> Sampler:
    only_keys(run, SDE_KEYS, "SDE run")
    last_step = run.get("last_step", "Mean")
    return EulerMaruyama(
        steps=run["num_steps"],
        diffusion=diffusion_form(run.get("form", "SBDM"), run.get("norm", 1.0)),
        last_step="none" if last_step is None else last_step.lower(),
        last_step_size=run.get("last_step_size", 0.04),
        method=run.get("method", "Euler").lower(),
    )


def _ode(run: Mapping[str, Any]) -> Sampler:
    only_keys(run, ODE_KEYS, "ODE run")
    steps, method = run["num_steps"] - 1, run.get("method", "dopri5")
    own = {"euler": Euler, "heun2": Heun}
    if method in own:
        return own[method](steps)
    tolerances = {"atol": run.get("atol", 1e-6), "rtol": run.get("rtol", 1e-3)}
    if method in ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"):
        return Adaptive(method, **tolerances)
    return Adaptive(method, steps=steps)


@kind("sit.samplers")
def samplers(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "runs"))
    network, inputs, out = build(case.config["model"], case), case.inputs, {}
    batch = len(inputs["z"])
    label, null = inputs["y_cfg"][:batch], inputs["y_cfg"][batch:]
    for name, run in case.config["runs"].items():
        sampler = pick({"sde": _sde, "ode": _ode}, run["mode"], "mode")(run)
        scale = run.get("cfg_scale", 1.0)
        backbone = ReversedClock(network, flip_sign=run["prediction"] == "velocity")
        field = guided_field(
            backbone,
            pick(PATHS, run["path"], "path")(),
            pick(PREDICTIONS, run["prediction"], "prediction")(),
            label if scale > 1 else inputs["y"],
            null,
            scale,
            channels=GUIDED_CHANNELS,
        )
        states: list[Tensor] = []
        with torch.no_grad():
            out[name] = sampler(field, inputs["z"], recorded_noise(inputs["noise"], batch), trace=states.append)
        if run.get("trace"):
            out[f"{name}/trace"] = torch.stack(states)
    return out
