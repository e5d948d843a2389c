"""Samplers of a discrete chain: convergence, order, known regions, and diffusers' own solver."""

import pytest
import torch

from repalign.errors import UserError
from repalign.paths.angular import AngularVelocity
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Data, Noise, Velocity
from repalign.paths.schedules import kept_steps
from repalign.paths.vp import DiscreteVPPath
from repalign.random import SampleRandom
from repalign.samplers.ddim import DDIM
from repalign.samplers.ddpm import DDPM
from repalign.samplers.dpm_solver import DPMSolverPlusPlus
from repalign.samplers.known_region import KnownRegion
from repalign.samplers.plms import PLMS
from tests.laws.exact import exact_field

PATH = DiscreteVPPath(1000, "scaled_linear", ends=(0.0015, 0.0195))
RANDOM = SampleRandom(3, range(5))
X_1 = RANDOM.normal("x_1", (2, 4, 4), torch.float64)
QUANTITIES = {"noise": Noise(), "data": Data(), "velocity": Velocity(), "angular": AngularVelocity()}


def error(sampler, quantity="noise") -> float:
    """Against the exact flow: quantiles stay quantiles."""
    c = PATH.coefficients(torch.tensor(1.0, dtype=torch.float64))
    at_end = c.alpha * 0.5, (c.alpha**2 * 0.25 + c.sigma**2).sqrt()
    exact = 0.5 + 0.5 * (X_1 - at_end[0]) / at_end[1]
    return float((sampler(exact_field(PATH, QUANTITIES[quantity]), X_1, RANDOM) - exact).abs().max())


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM("250", dtype="float64"),
        PLMS("100", end="data", dtype="float64"),
        DPMSolverPlusPlus(100, 2, "linspace", dtype="float64"),
        DPMSolverPlusPlus(120, 3, "linspace", end="first_step", dtype="float64"),
    ],
)
def test_every_prediction_gives_the_data(sampler, quantity):
    assert error(sampler, quantity) < 0.05


def test_more_estimates_are_worth_more_steps():
    errors = [error(DPMSolverPlusPlus(30, order, "linspace", end="first_step", dtype="float64")) for order in (1, 3)]
    assert errors[1] < errors[0] / 4
    assert error(PLMS("40", end="data", dtype="float64")) < error(DDIM("40", dtype="float64")) / 4


def test_order_one_is_ddim():
    field = exact_field(PATH, Noise())
    kept = DPMSolverPlusPlus(10, 1, "trailing", dtype="float64").times(field)
    spec = sorted(round(float(t) * 1000) - 1 for t in kept[:-1])
    assert spec == list(range(99, 1000, 100))
    x = X_1
    for now, after in zip(kept[:-1], kept[1:], strict=True):
        a, b = PATH.coefficients(now), PATH.coefficients(after)
        eps = field(x, now).pred
        x = b.alpha * (x - a.sigma * eps) / a.alpha + b.sigma * eps
    found = DPMSolverPlusPlus(10, 1, "trailing", dtype="float64")(field, X_1, RANDOM)
    torch.testing.assert_close(found, x)


def test_the_solver_runs_on_continuous_paths():
    field = exact_field(LinearPath(), Velocity())
    found = DPMSolverPlusPlus(40, 2, "time", shift=2.0, dtype="float64")(field, X_1, RANDOM)
    torch.testing.assert_close(found, 0.5 + 0.5 * X_1, rtol=0.02, atol=0.02)
    with pytest.raises(UserError, match="needs the discrete path"):
        DPMSolverPlusPlus(40)(field, X_1, RANDOM)


@pytest.mark.parametrize(
    "sampler", [DDIM("ldm10", eta=1.0, end="first_step"), PLMS("ldm10"), DDPM(10, variance="fixed_small")]
)
def test_a_known_region_comes_out_as_it_was(sampler):
    x_0, mask = torch.full((5, 2, 4, 4), 0.25), torch.zeros(5, 1, 4, 4)
    mask[..., :2] = 1
    field = exact_field(PATH, Noise())
    known = KnownRegion(x_0, mask, PATH)
    found = sampler(field, X_1, RANDOM, before_step=known)
    free = sampler(field, X_1, RANDOM)
    deviation = (found - 0.25).abs()
    assert deviation[..., :2].max() < 0.2 and (free - 0.25).abs()[..., :2].max() > 0.3
    torch.testing.assert_close(found[..., 2:], free[..., 2:])  # this network looks at each place alone


def test_steps_of_ldm():
    assert kept_steps(1000, "ldm6") == [1, 167, 333, 499, 665, 831, 997]
    assert kept_steps(1000, "ldm_quad5") == [1, 51, 201, 451, 801]
    with pytest.raises(UserError, match="leaves the chain"):
        kept_steps(1000, "ldm1000")


def test_wrong_options_name_their_key():
    for make, key in (
        (lambda: DDIM(end="nowhere"), "sampler.end"),
        (lambda: DPMSolverPlusPlus(order=4), "sampler.order"),
        (lambda: DPMSolverPlusPlus(spacing="even"), "sampler.spacing"),
        (lambda: DPMSolverPlusPlus(end="nowhere"), "sampler.end"),
        (lambda: DiscreteVPPath(schedule="squaredcos_cap_v2", ends=(0.1, 0.2)), "path.ends"),
    ):
        with pytest.raises(UserError, match=key):
            make()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_solver_is_that_of_diffusers(order, spacing):
    from diffusers import DPMSolverMultistepScheduler

    path = DiscreteVPPath(1000, "scaled_linear", ends=(0.00085, 0.012))
    field = exact_field(path, Noise())
    for steps, ends in ((6, "zero"), (16, "zero"), (16, "sigma_min")):
        theirs = DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            solver_order=order,
            timestep_spacing=spacing,
            steps_offset=1,
            final_sigmas_type=ends,
        )
        theirs.set_timesteps(steps)
        x = X_1
        for t in theirs.timesteps:
            x = theirs.step(field(x, (t.double() + 1) / 1000).pred, t, x).prev_sample
        ours = DPMSolverPlusPlus(steps, order, spacing, end="data" if ends == "zero" else "first_step", dtype="float64")
        torch.testing.assert_close(ours(field, X_1, RANDOM), x, rtol=1e-4, atol=1e-4)
