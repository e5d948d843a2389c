"""Our paths and samplers as schedulers of diffusers, where they have one that takes the same steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from repalign.backbones.clocks import StepClock, unwrapped
from repalign.backbones.mmdit import MMDiT
from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance, NoGuidance
from repalign.paths.angular import AngularVelocity
from repalign.paths.interval import time_interval
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Data, Noise, Velocity
from repalign.paths.time import shift_time
from repalign.paths.vp import DiscreteVPPath
from repalign.samplers.ddim import DDIM
from repalign.samplers.dpm_solver import DPMSolverPlusPlus
from repalign.samplers.euler import Euler
from repalign.samplers.grid import time_grid
from repalign.samplers.plms import PLMS
from repalign.training.generate import ImageGenerator

PREDICTIONS: Mapping[type, str] = {Noise: "epsilon", Data: "sample", AngularVelocity: "v_prediction"}
NAMED = ("linear", "scaled_linear", "squaredcos_cap_v2")  # schedules of betas that diffusers has by the same name


@dataclass(frozen=True)
class Schedule:
    """``scheduler_config.json`` and the number of steps that the pipeline is called with."""

    config: Mapping[str, Any]
    steps: int


Make = Callable[[ImageGenerator], Schedule]


def flow_match_euler(generator: ImageGenerator) -> Schedule:
    """``FlowMatchEulerDiscreteScheduler`` for Euler steps of a velocity on the straight path.

    It has two grids of ours: that of Stable Diffusion 3's code (``sampler=sd3_euler``: the last step begins at 1/1000
    shifted once, before the grid is shifted again), and the uniform one without a shift, for one number of steps.

    Raises:
        UserError: for another path, prediction, clock or grid.
    """
    sampler, network = generator.sampler, unwrapped(generator.backbone)
    assert isinstance(sampler, Euler) and isinstance(network, MMDiT)
    if type(generator.path) is not LinearPath or type(generator.parametrization) is not Velocity:
        raise _refused("path", "needs path=linear and parametrization=velocity", generator.path)
    if generator.backbone is not network:
        raise _refused("clock", "feeds the time of the noise; needs clock=native", generator.backbone)
    whole = round(network.time_scale)
    if whole != network.time_scale or whole < 2:
        raise UserError(f"backbone.time_scale: diffusers feeds steps of a chain (1000), found {network.time_scale:g}")
    ends = time_interval(generator.path, generator.parametrization)
    start = ends.high if sampler.start is None else sampler.start
    end = ends.low if sampler.end is None else sampler.end
    times = time_grid(start, end, sampler.steps, sampler.shift, sampler.last_step_size)[sampler.skip :]
    steps = len(times) - 1

    def grid(last: torch.Tensor) -> torch.Tensor:
        return shift_time(torch.cat([torch.linspace(1, float(last), steps), torch.zeros(1)]).double(), sampler.shift)

    config = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": whole,
        "shift": sampler.shift,
    }
    if torch.allclose(times, grid(shift_time(torch.tensor(1 / whole), sampler.shift)), rtol=0, atol=1e-6):
        return Schedule(config, steps)
    if sampler.shift == 1 and torch.allclose(times, grid(times[-2]), rtol=0, atol=1e-6):
        return Schedule({**config, "shift_terminal": float(times[-2])}, steps)
    raise UserError(
        "sampler: diffusers' FlowMatchEulerDiscreteScheduler has the grid of sampler=sd3_euler, or a uniform one with "
        f"shift 1; found shift={sampler.shift:g}, last_step_size={sampler.last_step_size}"
    )


def ddim(generator: ImageGenerator) -> Schedule:
    """``DDIMScheduler`` for deterministic DDIM on an even stride of the chain.

    Raises:
        UserError: for noise between the steps, a clipped estimate, or other steps.
    """
    sampler = generator.sampler
    assert isinstance(sampler, DDIM)
    if sampler.eta > 0:
        raise UserError(
            f"sampler.eta: found {sampler.eta:g}, whose noise diffusers draws otherwise; set sampler.eta=0, and give "
            "the pipeline its own eta at the call"
        )
    if sampler.clip:
        raise UserError("sampler.clip: diffusers does not derive the noise again from a clipped estimate; set it false")
    return _strided(generator, sampler.steps, sampler.end, {"_class_name": "DDIMScheduler", "clip_sample": False})


def pndm(generator: ImageGenerator) -> Schedule:
    """``PNDMScheduler`` without Runge-Kutta steps for LDM's PLMS on an even stride of the chain.

    Raises:
        UserError: for a network that predicts something else than the noise, or other steps.
    """
    sampler = generator.sampler
    assert isinstance(sampler, PLMS)
    if type(generator.parametrization) is not Noise:
        raise _refused("parametrization", "extrapolates what the network predicts; PLMS needs parametrization=noise")
    if str(sampler.steps) == "ldm1":
        raise UserError("sampler.steps: diffusers' PLMS of one step is DDIM's; set sampler=ldm_ddim")
    return _strided(generator, sampler.steps, sampler.end, {"_class_name": "PNDMScheduler", "skip_prk_steps": True})


def dpm_solver(generator: ImageGenerator) -> Schedule:
    """``DPMSolverMultistepScheduler``, whose grids and rules our sampler keeps.

    Raises:
        UserError: for a grid that is uniform in time.
    """
    sampler = generator.sampler
    assert isinstance(sampler, DPMSolverPlusPlus)
    if sampler.spacing == "time":
        raise UserError("sampler.spacing: diffusers steps along the chain; set leading, linspace or trailing")
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        **_chain(generator),
        "algorithm_type": "dpmsolver++",
        "solver_order": sampler.order,
        "timestep_spacing": sampler.spacing,
        "steps_offset": sampler.offset if sampler.spacing == "leading" else 1,  # of the others it is not read
        "lower_order_final": sampler.lower_order_last,
        "final_sigmas_type": "zero" if sampler.end == "data" else "sigma_min",
    }
    return Schedule(config, sampler.steps)


FLOW: Mapping[type, Make] = {Euler: flow_match_euler}
CHAIN: Mapping[type, Make] = {DDIM: ddim, PLMS: pndm, DPMSolverPlusPlus: dpm_solver}


def schedule_of(generator: ImageGenerator, known: Mapping[type, Make]) -> Schedule:
    """The scheduler that takes the sampler's steps.

    Raises:
        UserError: when there is none; the line says which part diffusers cannot express and what to set.
    """
    make = known.get(type(generator.sampler))
    if make is None:
        names = ", ".join(kind.__name__ for kind in known)
        raise _refused("sampler", f"takes the steps of {names}; set it for the export", generator.sampler)
    return make(generator)


def scale_of(generator: ImageGenerator) -> float:
    """The scale of a guidance that pipelines have; 1 for none.

    Raises:
        UserError: for guidance in an interval, of some channels, or of another kind.
    """
    guidance = generator.guidance
    if isinstance(guidance, NoGuidance):
        return 1.0
    if type(guidance) is not ClassifierFreeGuidance:
        raise _refused("guidance", "has classifier-free guidance alone; set guidance=cfg or none", guidance)
    plain = guidance.interval == (0, 1) and not guidance.open_interval
    if not plain or guidance.channels is not None or guidance.stream_scales:
        raise UserError(
            "guidance: diffusers guides at every step and every channel; set guidance.interval=[0,1] "
            "guidance.open_interval=false guidance.channels=null"
        )
    if guidance.scale < 1:
        raise UserError(f"guidance.scale: diffusers guides above 1 alone, found {guidance.scale:g}")
    return float(guidance.scale)


def _chain(generator: ImageGenerator) -> dict[str, Any]:
    """Betas and prediction, for every scheduler of a chain."""
    path, prediction = generator.path, PREDICTIONS.get(type(generator.parametrization))
    if not isinstance(path, DiscreteVPPath) or len(path) != path.steps:
        raise _refused("path", "needs a whole discrete chain (path=ddpm or ldm)", path)
    if prediction is None:
        raise _refused("parametrization", "needs noise, data or angular_velocity", generator.parametrization)
    if not isinstance(generator.backbone, StepClock) or generator.backbone.steps != path.steps:
        raise _refused("clock", "feeds the steps of the chain; needs clock=steps", generator.backbone)
    config: dict[str, Any] = {"num_train_timesteps": path.steps, "prediction_type": prediction}
    if path.schedule not in NAMED:
        return {**config, "trained_betas": path.betas.tolist()}
    first, last = (float(f"{float(path.betas[place]):.12g}") for place in (0, -1))
    return {**config, "beta_schedule": path.schedule, "beta_start": first, "beta_end": last}


def _strided(generator: ImageGenerator, steps: str | int, end: str, config: Mapping[str, Any]) -> Schedule:
    chain, path = _chain(generator), generator.path
    assert isinstance(path, DiscreteVPPath)
    kept = path.respaced(steps).timestep_map
    count, offset = len(kept), int(kept[0])
    stride = path.steps // count
    if offset >= stride or not torch.equal(kept, torch.arange(count) * stride + offset):
        raise UserError(
            f"sampler.steps: diffusers takes every {stride}th of {path.steps} steps for {count} of them, and "
            f"'{steps}' others; set ddim50 or ldm50 (or another divisor)"
        )
    return Schedule(
        {
            **config,
            **chain,
            "timestep_spacing": "leading",
            "steps_offset": offset,
            "set_alpha_to_one": end == "data",
        },
        count,
    )


def _refused(key: str, reason: str, found: object | None = None) -> UserError:
    name = "" if found is None else f", found {type(found).__name__}"
    return UserError(f"{key}: the pipeline of diffusers {reason}{name}")
