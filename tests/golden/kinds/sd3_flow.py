"""SD3's flow: densities of times, loss, time grids, samplers and guidance (Stability-AI/sd3.5, diffusers)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.autoencoders.latent_norm import ScaleShift
from repalign.checkpoints.sd3 import SD3Adapter
from repalign.errors import unknown_choice
from repalign.guidance.cfg import ClassifierFreeGuidance, NoGuidance
from repalign.guidance.skip_layer import SkipLayerGuidance, interval_of_steps
from repalign.objectives.denoising import Denoising
from repalign.objectives.weighting import CosMapWeight, InverseVarianceWeight, Weighting
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import CosMap, LogitNormal, Mode, Shifted, Uniform, shift_time
from repalign.protocols import Field, Guidance, TimeSampler
from repalign.samplers.euler import Euler
from repalign.samplers.field import DenoisingField, predict
from repalign.samplers.flow_dpm import FlowDPMSolver2M
from repalign.samplers.grid import time_grid
from repalign.state import Cond
from tests.golden.building import RecordedRandom, collect_gradients, recorded_noise
from tests.golden.kinds.sd3 import build, condition
from tests.golden.runner import Case, kind, only_keys

SMALLEST = 1 / 1000  # the smallest time of the official table of 1000
DENSITIES: Mapping[str, Callable[..., TimeSampler]] = {
    "lognorm": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "uniform": Uniform,
}
WEIGHTINGS: Mapping[str, Callable[[], Weighting | None]] = {
    "none": lambda: None,
    "cosmap": CosMapWeight,
    "sigma_sqrt": InverseVarianceWeight,
}
SAMPLERS = {"euler": Euler, "dpmpp_2m": FlowDPMSolver2M}


def grid(steps: int, shift: float) -> Tensor:
    """The reference's and diffusers' grid: its smallest time is shifted already, then all are shifted again."""
    return time_grid(1.0, 0.0, steps, shift, last_step_size=shift_time(torch.tensor(SMALLEST).double(), shift).item())


@kind("sd3.rf_loss")
def rf_loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    network = build(config, case.weights, inputs["x0"], ("density", "shift", "weighting"))
    (name, *numbers), batch = config["density"], len(inputs["x0"])
    if name not in DENSITIES:
        raise unknown_choice("density", name, DENSITIES)
    times = DENSITIES[name](*numbers)
    weighting = WEIGHTINGS[config["weighting"]]()
    objective = Denoising(LinearPath(), Velocity(), Shifted(times, config["shift"]), weighting)
    drawn = inputs["u_normal" if name == "lognorm" else "u_uniform"]
    random = RecordedRandom(batch, {"t": drawn, "eps": inputs["noise"]}, {})
    draw = objective.draw(inputs["x0"], random)
    step = objective(network, inputs["x0"], condition(inputs), draw)
    assert step.sample is not None and draw.t is not None
    loss = step.losses["denoising"]
    gradients = SD3Adapter().to_official({"backbone": collect_gradients(network, loss.mean())})
    return {
        "t": draw.t,
        "z_t": step.sample.x_t,
        "weight": torch.ones(batch) if weighting is None else weighting(step.sample.coefficients),
        "loss_per_sample": loss,
        "loss": loss.mean(),
        **{f"grad/{key}": value for key, value in gradients.items()},
    }


def _guidance(config: Mapping[str, Any], times: Tensor) -> Guidance:
    plain = ClassifierFreeGuidance(config["cfg_scale"]) if config["cfg_scale"] != 1 else NoGuidance()
    skip = config.get("skip_layer")
    if skip is None or skip["scale"] <= 0:
        return plain
    only_keys(skip, ("scale", "start", "end", "layers"), "skip_layer")
    # The official fractions are of all steps, while its counter begins where the grid does.
    padded = torch.cat([times, times.new_zeros(config["steps"] + 1 - len(times))])
    interval = interval_of_steps(padded, skip["start"], skip["end"])
    if interval is None:
        return plain
    return SkipLayerGuidance(config["cfg_scale"], skip["scale"], [k + 1 for k in skip["layers"]], interval)


@kind("sd3.sampler")
def sampler(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    extra = ("steps", "shift", "cfg_scale", "sampler", "skip_layer", "denoise")
    network = build(config, case.weights, inputs["noise"], extra)
    if config["sampler"] not in SAMPLERS:
        raise unknown_choice("sampler", config["sampler"], SAMPLERS)
    steps, shift = config["steps"], config["shift"]
    skip = int(steps * (1 - config.get("denoise", 1.0)))
    times = grid(steps, shift)[skip:]
    make = SAMPLERS[config["sampler"]](
        steps, shift=shift, last_step_size=shift_time(torch.tensor(SMALLEST).double(), shift).item(), skip=skip
    )

    def bind(cond: Cond) -> Field:
        return DenoisingField(network, LinearPath(), Velocity(), cond)

    field = _guidance(config, times)(bind, condition(inputs), condition(inputs, "null_"))
    init = inputs.get("init_latent", torch.zeros_like(inputs["noise"]))
    start = LinearPath().sample(init, inputs["noise"], times[:1].float()).x_t
    states = [start]
    with torch.no_grad():
        final = make(field, start, recorded_noise(inputs["noise"][None], len(start)), trace=states.append)
        guessed = []
        for x, t in zip(states[:-1], times[:-1], strict=True):
            pred, c = predict(field, x, t)
            guessed.append(field.parametrization.data(pred, x, c))
    return {
        "sigmas": times,
        "trajectory": torch.stack(states),
        "x0_pred": torch.stack(guessed),
        "final": final,
        "final_unscaled_latent": ScaleShift(1.5305, 0.0609).denormalize(final),
    }


@kind("sd3.schedules")
def schedules(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("lognorm", "mode", "shifts", "N"))
    config, t = case.config, case.inputs["t_eval"]
    batch = len(case.inputs["u_normal"])
    normal = RecordedRandom(batch, {"t": case.inputs["u_normal"]}, {})
    uniform = RecordedRandom(batch, {"t": case.inputs["u_uniform"]}, {})
    c = LinearPath().coefficients(t)
    out = {
        "t_cosmap": CosMap()(uniform),
        "pdf_cosmap": CosMap.density(t),
        "weight_cosmap": CosMapWeight()(c),
        "weight_sigma_sqrt": InverseVarianceWeight()(c),
    }
    for mean, std in config["lognorm"]:
        out[f"t_lognorm_m{mean}_s{std}"] = LogitNormal(mean, std)(normal)
        out[f"pdf_lognorm_m{mean}_s{std}"] = LogitNormal(mean, std).density(t)
    for scale in config["mode"]:
        out[f"t_mode_s{scale}"] = Mode(scale)(uniform)
    for shift in config["shifts"]:
        out[f"shift{shift}_of_t"] = shift_time(t, shift)
        for steps in config["N"]:
            times = grid(steps, shift)
            for name in ("ref", "fme"):
                out[f"sigmas_{name}_shift{shift}_N{steps}"] = times
            out[f"timesteps_fme_shift{shift}_N{steps}"] = 1000 * times[:-1]
    for steps in config["N"]:
        # Dynamic shift: one shift by e^mu over times that are not shifted yet.
        dynamic = time_grid(1.0, 0.0, steps, math.exp(0.8), last_step_size=SMALLEST)
        out[f"sigmas_fme_dynamic_mu0.8_N{steps}"] = dynamic
    return out
