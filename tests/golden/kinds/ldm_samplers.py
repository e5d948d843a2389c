"""Samplers of LDM and the DPM-Solver++ of diffusers. Step k is the house's time (k + 1) / 1000."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repalign.backbones.clocks import StepClock
from repalign.errors import unknown_choice
from repalign.guidance.cfg import ClassifierFreeGuidance
from repalign.paths.parametrization import Noise
from repalign.paths.vp import DiscreteVPPath
from repalign.samplers.ddim import DDIM
from repalign.samplers.dpm_solver import DPMSolverPlusPlus
from repalign.samplers.field import DenoisingField
from repalign.samplers.known_region import KnownRegion
from repalign.samplers.plms import PLMS
from repalign.state import Cond, Output, State, Tokens
from tests.golden.building import RecordedRandom
from tests.golden.kinds.ldm_unet import UNET_KEYS, unet
from tests.golden.runner import Case, kind, only_keys

SAMPLERS = {
    "ddim": lambda config: DDIM(_steps(config), config.get("eta", 0.0), end="first_step"),
    "plms": lambda config: PLMS(_steps(config)),
}


def _steps(config: Mapping[str, Any]) -> str:
    return {"uniform": "ldm", "quad": "ldm_quad"}[config.get("discretize", "uniform")] + str(config["S"])


def ends(words: str) -> tuple[float, float]:
    """First and last beta of "linear(sqrt-space) .00085..012" (or "...")."""
    found = re.findall(r"(?<![\d.])(\.\d+)\.+(\d+)$", words)
    if not found:
        raise KeyError(f"betas: expected '... .00085..012', found '{words}'")
    low, high = found[0]
    return float(low), float(f".{high}")


class _Observed:
    """A field that notes the steps at which it was called."""

    def __init__(self, field: DenoisingField) -> None:
        self.field, self.steps = field, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.field, name)

    def __call__(self, x_t: State, t: Tensor, carry: Any = None) -> Output:
        self.steps.append(round(float(t) * 1000) - 1)
        return self.field(x_t, t, carry)


@kind("ldm.sampler")
def sampler(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, (*UNET_KEYS, "sampler", "S", "eta", "cfg_scale", "betas", "mask", "discretize"))
    if config["sampler"] not in SAMPLERS:
        raise unknown_choice("sampler", config["sampler"], SAMPLERS)
    network = unet({k: v for k, v in config.items() if k in UNET_KEYS}, case.weights)
    path = DiscreteVPPath(1000, "scaled_linear", ends=ends(config["betas"]))

    def bind(cond: Cond) -> DenoisingField:
        return DenoisingField(StepClock(network, 1000), path, Noise(), cond)

    cond, null = (Cond(text=Tokens(inputs[name])) for name in ("context", "null_context"))
    field = _Observed(ClassifierFreeGuidance(config["cfg_scale"])(bind, cond, null))
    noises = {"noise": "step_noise", "known": "mask_noise"}
    random = RecordedRandom(
        len(inputs["x_T"]), {}, {ours: inputs[theirs] for ours, theirs in noises.items() if theirs in inputs}
    )
    known = KnownRegion(inputs["x0_known"], inputs["mask"], path) if config.get("mask", False) else None
    states, estimates = [inputs["x_T"]], []
    with torch.no_grad():
        final = SAMPLERS[config["sampler"]](config)(
            field, inputs["x_T"], random, trace=states.append, trace_x_0=estimates.append, before_step=known
        )
    # The first step of PLMS makes a second call, at the next step.
    steps = field.steps if len(field.steps) == len(estimates) else [field.steps[0], *field.steps[2:]]
    return {
        "final": final,
        "trajectory": torch.stack(states),
        "pred_x0": torch.stack(estimates),
        "steps": torch.tensor(steps),
    }


class _SyntheticField(nn.Module):
    """tanh(A x) (0.5 + 0.5 k / 1000) + 0.3 x with A acting on channels, at step k."""

    tap_specs: Mapping[str, Any] = {}
    uses_carry = False

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(
        self,
        x_t: Tensor,
        step: Tensor,
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        mixed = torch.einsum("dc,bchw->bdhw", self.matrix, x_t)
        return Output(torch.tanh(mixed) * (0.5 + 0.5 * step[:, None, None, None] / 1000) + 0.3 * x_t)


@kind("ldm.sampler_dpmpp")
def dpm_solver(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, "N order final_sigmas_type betas spacing steps_offset lower_order_final".split())
    endings = {"zero": "data", "sigma_min": "first_step"}
    if config.get("final_sigmas_type", "zero") not in endings:
        raise unknown_choice("final_sigmas_type", config["final_sigmas_type"], endings)
    solver = DPMSolverPlusPlus(
        steps=config["N"],
        order=config.get("order", 2),
        spacing=config.get("spacing", "linspace"),
        offset=config.get("steps_offset", 0),
        end=endings[config.get("final_sigmas_type", "zero")],
        lower_order_last=config.get("lower_order_final", True),
    )
    path = DiscreteVPPath(1000, "scaled_linear", ends=ends(config["betas"]))
    field = DenoisingField(StepClock(_SyntheticField(inputs["A"]), 1000), path, Noise(), Cond())
    states = [inputs["x_T"]]
    with torch.no_grad():
        final = solver(field, inputs["x_T"], RecordedRandom(len(inputs["x_T"]), {}, {}), trace=states.append)
    times = solver.times(field)
    c = path.coefficients(times)
    return {
        "final": final,
        "trajectory": torch.stack(states),
        "timesteps": (times[:-1] * 1000).round().long() - 1,
        "sigmas": c.sigma / c.alpha,
    }
