"""DDT (MCG-NJU/DDT): schedules, guidance, samplers, encoder sharing. In its time t_ddt = 1 - t and v_ddt = -v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.backbones.clocks import ReversedClock
from repalign.conditioners.label import LabelConditioner
from repalign.guidance.cfg import ClassifierFreeGuidance, guide
from repalign.paths.gvp import GVPPath
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity, linear_drift
from repalign.protocols import Backbone, Field, Sampler
from repalign.samplers.diffusion import Sigma
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.field import DenoisingField
from repalign.samplers.grid import time_grid
from repalign.samplers.heun import Heun
from repalign.samplers.multistep import BASES, LinearMultistep, multistep_weights
from repalign.samplers.refresh import Every, SharedCarry
from repalign.samplers.similarity import choose_steps, step_similarity
from repalign.state import Coefficients, Cond, Output
from tests.golden.building import recorded_noise
from tests.golden.kinds.ddt import build, size_of
from tests.golden.runner import Case, kind, only_keys

FIELD = "net(x,t,y)=A[y]*x*(1+t)+b[y]*cos(3t)-0.3*tanh(x) (A,b of shape (classes,C,H,W); last index is the null class)"


@kind("ddt.schedules")
def schedules(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ())
    t = case.inputs["t"]
    ours = LinearPath().coefficients(1 - t)
    linear = Coefficients(ours.alpha, ours.sigma, -ours.d_alpha, -ours.d_sigma)
    # As released, GVP runs from data to noise, unlike its linear path, and lacks the factor pi/2 of the derivatives.
    ours = GVPPath().coefficients(t)
    gvp = Coefficients(ours.alpha, ours.sigma, -ours.sigma, ours.alpha)
    found = {}
    for name, c, w in (("linear", linear, Sigma()(t, linear)), ("gvp", gvp, torch.sin(t) ** 2)):
        # Its drift and diffusion are guarded by an epsilon.
        f, g = linear_drift(Coefficients(c.alpha + 1e-6, c.sigma, c.d_alpha, c.d_sigma))
        entries = {
            "alpha": c.alpha,
            "sigma": c.sigma,
            "dalpha": c.d_alpha,
            "dsigma": c.d_sigma,
            "dalpha_over_alpha": linear_drift(c)[0],
            "dsigma_mul_sigma": c.d_sigma * c.sigma,
            "drift_coefficient": f,
            "diffuse_coefficient": g,
            "w": w,
        }
        found |= {f"{name}/{key}": value for key, value in entries.items()}
    return found


@kind("ddt.guidance")
def guidance(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("cfg",))
    scale = case.config["cfg"]
    null, cond = case.inputs["out"].chunk(2)
    return {
        "simple_guidance_fn": guide(cond, null, scale),
        "c3_guidance_fn": guide(cond, null, scale, channels=3),
        "c4_guidance_fn": guide(cond, null, scale, channels=4, other_scale=1.05),
        "c4_p10_guidance_fn": guide(cond, null, scale, channels=4, other_scale=1.10),
        "p4_guidance_fn": guide(cond, null, 1.0, channels=4, other_scale=scale),
    }


def guided(
    backbone: Backbone, label: Tensor, null: Tensor, scale: float, interval: tuple[float, float] | None = None
) -> Field:
    """A field under guidance in an open interval of DDT's time; None for guidance at all times."""
    open_interval = interval is not None
    low, high = interval or (0.0, 1.0)
    rule = ClassifierFreeGuidance(scale, (1 - high, 1 - low), open_interval=open_interval)

    def bind(cond: Cond) -> Field:
        return DenoisingField(backbone, LinearPath(), Velocity(), cond)

    return rule(bind, Cond(label=label), Cond(label=null))


def trajectory(sampler: Sampler, field: Field, noise: Tensor, step_noise: Tensor | None = None) -> dict[str, Tensor]:
    """The states before every step and the last one."""
    states = [noise]
    random = recorded_noise(noise.unsqueeze(0) if step_noise is None else step_noise, len(noise))
    with torch.no_grad():
        final = sampler(field, noise, random, trace=states.append)
    return {"x_before_step": torch.stack(states[:-1]), "x_final": final}


def official_times(steps: int, last_step: float, shift: float) -> Tensor:
    """Our grid in DDT's time."""
    return 1 - time_grid(1.0, 0.0, steps, shift, last_step)


EULER_KEYS = (
    "denoiser",
    "num_steps",
    "last_step",
    "timeshift",
    "guidance",
    "interval_min_exclusive",
    "interval_max_exclusive",
    "state_refresh_rate",
)


@kind("ddt.sampler_euler")
def sampler_euler(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, EULER_KEYS)
    config, noise, label = case.config, case.inputs["noise"], case.inputs["y"]
    network = build(config["denoiser"], case.weights, size_of(noise))
    recomputed: list[bool] = []

    def note(module: torch.nn.Module, args: Any, options: Mapping[str, Any]) -> None:
        recomputed.append(options["carry"] is None)

    network.register_forward_pre_hook(note, with_kwargs=True)
    null = LabelConditioner(config["denoiser"]["num_classes"]).null(len(noise), noise.device).label
    interval = (config["interval_min_exclusive"], config["interval_max_exclusive"])
    field = guided(ReversedClock(network), label, null, config["guidance"], interval)
    grid = {"steps": config["num_steps"], "shift": config["timeshift"], "last_step_size": config["last_step"]}
    sampler = SharedCarry(Euler(**grid), Every(config["state_refresh_rate"]))
    found = trajectory(sampler, field, noise)
    return {
        **found,
        "timesteps": official_times(config["num_steps"], config["last_step"], config["timeshift"]),
        "encoder_recomputed": torch.tensor(recomputed).long(),
    }


class _Analytic:
    """The field of the case as a backbone in DDT's time; it counts its calls."""

    tap_specs: Mapping[str, Any] = {}
    uses_carry = False

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, **options: Any) -> Output:
        self.calls += 1
        t = t.reshape(-1, 1, 1, 1)
        a, b = self.a[cond.label], self.b[cond.label]
        return Output(a * x * (1 + t) + b * torch.cos(3 * t) - 0.3 * torch.tanh(x))


@kind("ddt.solvers")
def solvers(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("num_steps", "last_step", "timeshift", "guidance", "field", "multistep_interval"))
    config, inputs = case.config, case.inputs
    if config["field"] != FIELD:
        raise KeyError(f"field: unknown formula '{config['field']}'")
    steps, last, shift = config["num_steps"], config["last_step"], config["timeshift"]
    grid = {"steps": steps, "last_step_size": last, "shift": shift}
    backbone = _Analytic(inputs["A"], inputs["b"])
    null = torch.full_like(inputs["y"], len(inputs["A"]) - 1)

    def field(interval: tuple[float, float] | None = None) -> Field:
        return guided(ReversedClock(backbone), inputs["y"], null, config["guidance"], interval)

    def sde(norm: float = 1.0, method: str = "euler") -> Sampler:
        return EulerMaruyama(steps, Sigma(norm), "euler", last, method, shift=shift)

    runs: dict[str, tuple[Sampler, Field]] = {
        "euler/ode_step_fn": (Euler(**grid), field()),
        "euler/sde_mean_step_fn": (sde(method="mean"), field()),
        "euler/sde_step_fn": (sde(), field()),
        "euler/sde_preserve_step_fn": (sde(0.5), field()),
        "heun/exact_True": (Heun(correct_last=False, **grid), field()),
        "heun/exact_False": (Heun(correct_last=False, reuse_slope=True, **grid), field()),
    }
    for order in range(1, 5):
        interval = tuple(config["multistep_interval"])
        runs[f"multistep/order_{order}"] = (LinearMultistep(order=order, **grid), field(interval))
    found = {"timesteps": official_times(steps, last, shift)}
    for name, (sampler, of) in runs.items():
        backbone.calls = 0
        states = trajectory(sampler, of, inputs["noise"], inputs["step_noise"])
        found |= {f"{name}/{key}": value for key, value in states.items()}
        found[f"{name}/num_net_calls"] = torch.tensor(backbone.calls)
    return found


TRANSFORMS = {"nop": "time", "t2snr": "snr", "t2logsnr": "log_snr"}


@kind("ddt.multistep_coefficients")
def multistep_coefficients(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("combos_n_laststep_shift",))
    found = {}
    for index, (steps, last, shift) in enumerate(case.config["combos_n_laststep_shift"]):
        found[f"timesteps/{index}"] = official_times(steps, last, shift)
        # The last interval's weights in alpha/sigma are a difference of huge numbers, decided by how the times were
        # rounded: they are rounded here as there.
        u = torch.cat([torch.linspace(0, 1 - last, steps), torch.ones(1)])
        t = u / (u + (1 - u) * shift)
        c = Coefficients(t, 1 - t, torch.ones_like(t), -torch.ones_like(t))
        for order in range(1, 5):
            for name, basis in TRANSFORMS.items():
                weights = multistep_weights(BASES[basis](t, c), order)
                columns = torch.zeros(steps, 4)
                columns[:, 4 - order :] = weights
                found[f"coeffs/{index}/order_{order}/{name}"] = columns
    return found


@kind("ddt.sharing_dp")
def sharing_dp(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("num_steps", "rates"))
    similarity = step_similarity(case.inputs["states"])
    steps = {f"recompute_steps/rate_{r}": torch.tensor(choose_steps(similarity, r)) for r in case.config["rates"]}
    return {"similarity": similarity, **steps}
