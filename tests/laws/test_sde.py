"""The reverse SDE: diffusions and last steps."""

from __future__ import annotations

import math

import pytest
import torch

from repalign.paths.parametrization import Velocity
from repalign.random import SampleRandom
from repalign.samplers.diffusion import FORMS, SBDM, Constant, Sigma, diffusion_form
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import LAST_STEPS, EulerMaruyama
from repalign.samplers.heun import Heun
from tests.laws.exact import PATHS, Generated, exact_field

RANDOM = SampleRandom(3, range(5))
X_1 = RANDOM.normal("x_1", (2, 3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_every_diffusion_gives_the_same_distribution(form, path):
    count = 2000
    random = SampleRandom(5, range(count))
    field = exact_field(PATHS[path], Velocity())
    # SBDM's coefficient is infinite at t = 1 where alpha is 0 there.
    start = 0.97 if form == "SBDM" and path != "vp" else None
    steps = 300 if form == "SBDM" else 60
    noise = Generated(count, 0)
    x = EulerMaruyama(steps, diffusion_form(form, 0.5), start=start)(field, random.normal("x_1", (1,)), noise)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(x.std()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("method", "ode"), [("euler", Euler), ("heun", Heun)])
def test_without_diffusion_the_sde_is_the_ode(method, ode):
    field = exact_field(PATHS["gvp"], Velocity())
    sde = EulerMaruyama(6, Constant(0.0), "none", method=method, end=0.01, dtype="float64")
    expected = ode(5, end=0.01, dtype="float64")(field, X_1, RANDOM)
    torch.testing.assert_close(sde(field, X_1, RANDOM), expected, rtol=1e-6, atol=1e-6)


def test_heun_refines_the_drift_but_not_the_noise():
    # One step by hand: the noise is added first, then both slopes are taken on the noisy state.
    field = exact_field(PATHS["linear"], Velocity())
    states = []
    EulerMaruyama(2, Constant(0.3), "none", end=0.5, method="heun", dtype="float64")(
        field, X_1, RANDOM, trace=states.append
    )
    t, t_next = (torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.5))

    def drift(x, time):
        v = field(x, time).pred
        return v - 0.3 * Velocity().score(v, x, field.path.coefficients(time))

    kicked = X_1.double() + math.sqrt(2 * 0.3 * 0.5) * RANDOM.at(0).normal_like("noise", X_1.double())
    first = drift(kicked, t)
    second = drift(kicked - 0.5 * first, t_next)
    torch.testing.assert_close(states[0], kicked - 0.25 * (first + second), rtol=1e-6, atol=1e-6)


def test_diffusions_are_those_of_the_papers():
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for path in PATHS.values():
        c = path.coefficients(t)
        torch.testing.assert_close(Constant(0.3)(t, c), torch.full_like(t, 0.3))
        torch.testing.assert_close(Sigma(2.0)(t, c), 2 * c.sigma)
        torch.testing.assert_close(diffusion_form("linear")(t, c), t)
        torch.testing.assert_close(diffusion_form("decreasing")(t, c), torch.sin(math.pi * t / 2) ** 4)
        torch.testing.assert_close(diffusion_form("increasing-decreasing")(t, c), torch.sin(math.pi * t) ** 2)
        torch.testing.assert_close(
            diffusion_form("inccreasing-decreasing")(t, c), diffusion_form("increasing-decreasing")(t, c)
        )
    c = PATHS["linear"].coefficients(t)
    torch.testing.assert_close(SBDM()(t, c), t / (1 - t))


@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_last_steps(last_step):
    field = exact_field(PATHS["linear"], Velocity(), mean=0.7, std=0.0)
    states = []
    size = 0.1
    sampler = EulerMaruyama(5, "sigma", last_step, last_step_size=size, dtype="float64")
    found = sampler(field, X_1, RANDOM, trace=states.append)
    before = states[-2]
    t = torch.tensor(size, dtype=torch.float64)
    eps = (before - (1 - size) * 0.7) / size
    expected = {
        "none": before,
        "tweedie": torch.full_like(found, 0.7),
        "euler": before - size * (eps - 0.7),
        "mean": before - size * ((eps - 0.7) + t * eps / size),
    }[last_step]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
