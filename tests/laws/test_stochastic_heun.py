"""Heun's method on the reverse SDE: distribution, order of the drift, calls, and the ODE without diffusion."""

from __future__ import annotations

import math

import pytest
import torch

from repalign.paths.parametrization import Velocity
from repalign.random import SampleRandom
from repalign.samplers.diffusion import Constant, Sigma, diffusion_form
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.heun import Heun
from repalign.samplers.stochastic_heun import StochasticHeun
from repalign.state import Streams
from tests.laws.exact import PATHS, Generated, exact_field

RANDOM = SampleRandom(3, range(5))
X_1 = RANDOM.normal("x_1", (2, 3), torch.float64)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("form", ["sigma", "linear", "constant", "decreasing"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_every_diffusion_gives_the_data(form, path, reuse):
    count = 2000
    field = exact_field(PATHS[path], Velocity())
    sampler = StochasticHeun(60, diffusion_form(form, 0.5), reuse_slope=reuse)
    x = sampler(field, SampleRandom(5, range(count)).normal("x_1", (1,)), Generated(count, 0))
    assert float(x.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(x.std()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_without_diffusion_it_is_heun_for_the_ode(reuse, shift):
    field = exact_field(PATHS["gvp"], Velocity())
    grid = {"last_step_size": 0.05, "shift": shift, "dtype": "float64"}
    found = StochasticHeun(7, Constant(0.0), reuse_slope=reuse, **grid)(field, X_1, RANDOM)
    expected = Heun(7, correct_last=False, reuse_slope=reuse, **grid)(field, X_1, RANDOM)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_one_step_by_hand():
    """Predictor and corrector share one noise; w is that of the step's beginning."""
    field = exact_field(PATHS["linear"], Velocity())
    states = []
    StochasticHeun(2, "sigma", last_step_size=0.5, dtype="float64")(field, X_1, RANDOM, trace=states.append)
    t, t_next = (torch.tensor(value, dtype=torch.float64) for value in (1.0, 0.5))

    def slopes(x, time):
        v = field(x, time).pred
        return v, Velocity().score(v, x, field.path.coefficients(time))

    kick = math.sqrt(2 * 1.0 * 0.5) * RANDOM.at(0).normal_like("noise", X_1)
    v, s = slopes(X_1, t)
    v_next, s_next = slopes(X_1 - 0.5 * (v - s) + kick, t_next)
    expected = X_1 - 0.5 * ((v + v_next) / 2 - (s + s_next) / 2) + kick
    torch.testing.assert_close(states[0], expected, rtol=1e-9, atol=1e-9)
    last = expected - 0.5 * slopes(expected, t_next)[0]
    torch.testing.assert_close(states[1], last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("diffusion", "reuse", "order"), [(Constant(0.3), False, 2), (Constant(0.3), True, 2), (Sigma(), False, 1)]
)
def test_order_of_the_drift(diffusion, reuse, order):
    """The noise left out, up to the last step, against a much finer run."""
    field = exact_field(PATHS["linear"], Velocity())

    def run(n):
        states = []
        sampler = StochasticHeun(n + 1, diffusion, noise=False, reuse_slope=reuse, dtype="float64")
        sampler(field, X_1, RANDOM, trace=states.append)
        return states[-2]

    finest = run(1600)
    errors = [float((run(n) - finest).abs().max()) for n in (50, 100)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("reuse", "calls"), [(False, 11), (True, 6)])
def test_calls_and_streams(reuse, calls):
    field = exact_field(PATHS["linear"], Velocity())
    sampler = StochasticHeun(6, reuse_slope=reuse, noise=False)
    alone = sampler(field, X_1, RANDOM)
    assert len(field.backbone.calls) == calls
    both = sampler(field, Streams(a=X_1, b=2 * X_1), RANDOM)
    torch.testing.assert_close(both["a"], alone)
    torch.testing.assert_close(sampler(field, X_1[1:3], RANDOM), alone[1:3])


def test_it_needs_fewer_steps_than_euler_maruyama_for_the_same_mean():
    field = exact_field(PATHS["linear"], Velocity())
    runs = {
        "heun": StochasticHeun(20, Constant(0.3), noise=False, dtype="float64"),
        "euler": EulerMaruyama(20, Constant(0.3), "euler", method="mean", dtype="float64"),
    }
    exact = StochasticHeun(800, Constant(0.3), noise=False, dtype="float64")(field, X_1, RANDOM)
    errors = {name: float((sampler(field, X_1, RANDOM) - exact).abs().max()) for name, sampler in runs.items()}
    assert errors["heun"] < errors["euler"]
