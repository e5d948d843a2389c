"""Order of convergence of the ODE samplers, measured on a field whose flow is known."""

from __future__ import annotations

import math

import pytest
import torch

from repalign.errors import UserError
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.random import SampleRandom
from repalign.samplers.diffusion import Sigma
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.grid import time_grid
from repalign.samplers.heun import Heun
from repalign.samplers.multistep import LinearMultistep, multistep_weights
from repalign.state import Output, Streams
from tests.laws.exact import PATHS, exact_field

RANDOM = SampleRandom(3, range(5))
X_1 = RANDOM.normal("x_1", (2, 3), torch.float64)


class Curved:
    """dx/dt = -x g(t) with g = 3 sin(3 t), or one that is flat at t = 1, so that a method's start makes no error."""

    path, parametrization, uses_carry = LinearPath(), Velocity(), False

    def __init__(self, flat=False):
        self.calls = 0
        self.flat = flat

    def during(self, t):
        return self

    def __call__(self, x_t, t, carry=None):
        self.calls += 1
        g = 9 * (1 - t) ** 5 if self.flat else 3 * torch.sin(3 * t)
        return Output(-g * x_t)

    def exact(self):
        return X_1 * math.exp(1.5 if self.flat else 1 - math.cos(3))


FORMS = {
    "euler": (lambda n, **o: Euler(n, dtype="float64", **o), 1),
    "heun": (lambda n, **o: Heun(n, dtype="float64", **o), 2),
    "heun_last_euler": (lambda n, **o: Heun(n, correct_last=False, dtype="float64", **o), 2),
    "heun_reuse": (lambda n, **o: Heun(n, correct_last=False, reuse_slope=True, dtype="float64", **o), 2),
    **{f"multistep_{k}": (lambda n, k=k, **o: LinearMultistep(n, k, dtype="float64", **o), k) for k in range(1, 5)},
}


def slope(make, flat=False, coarse=300, fine=600, **options) -> float:
    field = Curved(flat)
    errors = [float((make(n, **options)(field, X_1, RANDOM) - field.exact()).abs().max()) for n in (coarse, fine)]
    return math.log(errors[0] / errors[1]) / math.log(fine / coarse)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("form", FORMS)
def test_order_of_convergence(form, shift):
    make, order = FORMS[form]
    assert slope(make, flat=True, shift=shift) == pytest.approx(order, abs=0.2)
    # A multistep method begins with a step of Euler's, whose own error is of second order.
    assert slope(make, shift=shift) == pytest.approx(min(order, 2), abs=0.2)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (Heun(6, correct_last=False), 11),
        (Heun(6, correct_last=False, reuse_slope=True), 6),
        (Heun(6, reuse_slope=True), 7),
        (LinearMultistep(6, 3), 6),
    ],
)
def test_calls(sampler, calls):
    field = Curved()
    sampler(field, X_1, RANDOM)
    assert field.calls == calls


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_multistep_integrates_polynomials_of_its_degree_exactly(order):
    times = time_grid(1.0, 0.0, 9, shift=2.5)
    weights = multistep_weights(times, order)
    for degree in range(order):
        for i in range(order - 1, 9):
            t, t_next = times[i], times[i + 1]
            area = (t_next ** (degree + 1) - t ** (degree + 1)) / (degree + 1)
            found = (t_next - t) * (weights[i] * times[i + 1 - order : i + 1] ** degree).sum()
            torch.testing.assert_close(found, area, rtol=1e-9, atol=1e-12)


def test_multistep_weights_are_adams_bashforths_on_a_uniform_grid():
    weights = multistep_weights(torch.linspace(0, 1, 8, dtype=torch.float64), 4)
    expected = torch.tensor([-9, 37, -59, 55], dtype=torch.float64) / 24
    torch.testing.assert_close(weights[5], expected)
    assert weights[0].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(weights[1], torch.tensor([0, 0, -0.5, 1.5], dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(7, dtype=torch.float64))


def test_multistep_of_order_one_is_euler():
    field = exact_field(PATHS["gvp"], Velocity())
    options = {"shift": 2.0, "last_step_size": 0.05, "dtype": "float64"}
    expected = Euler(7, **options)(field, X_1, RANDOM)
    for basis in ("time", "log_snr"):
        found = LinearMultistep(7, 1, basis, **options)(field, X_1, RANDOM)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("basis", ["time", "snr", "log_snr"])
def test_every_basis_gives_the_data(basis):
    field = exact_field(PATHS["linear"], Velocity())
    found = LinearMultistep(200, 2, basis, end=0.001, dtype="float64")(field, X_1, RANDOM)
    torch.testing.assert_close(found, 0.5 + 0.5 * X_1, rtol=0.02, atol=0.03)


def test_streams_and_batches():
    field = exact_field(PATHS["linear"], Velocity())
    sampler = LinearMultistep(5, 3)
    both = sampler(field, Streams(a=X_1, b=2 * X_1), RANDOM)
    torch.testing.assert_close(both["b"], sampler(field, 2 * X_1, RANDOM))
    torch.testing.assert_close(sampler(field, X_1[1:3], RANDOM), sampler(field, X_1, RANDOM)[1:3])


def test_last_step_grid():
    times = time_grid(1.0, 0.0, 5, last_step_size=0.04)
    torch.testing.assert_close(times, torch.tensor([1, 0.76, 0.52, 0.28, 0.04, 0], dtype=torch.float64))
    shifted = time_grid(1.0, 0.0, 5, 2.0, 0.04)
    torch.testing.assert_close(shifted, 2 * times / (1 + times))
    torch.testing.assert_close(time_grid(1.0, 0.0, 5, last_step_size=0.2), time_grid(1.0, 0.0, 5))
    assert time_grid(1.0, 0.0, 1, last_step_size=0.3).tolist() == [1, 0]


def test_an_sde_is_shifted_with_its_last_step():
    field = exact_field(PATHS["linear"], Velocity())
    EulerMaruyama(5, last_step="euler", last_step_size=0.04, shift=2.0)(field, X_1, RANDOM)
    expected = time_grid(1.0, 0.0, 5, 2.0, 0.04)[:-1].tolist()
    assert [t for _, t in field.backbone.calls] == pytest.approx(expected, abs=1e-6)


def test_the_mean_of_the_sde_step_has_no_noise_and_half_the_diffusion_half_the_correction():
    field = exact_field(PATHS["linear"], Velocity())
    runs = {}
    for method, norm in (("mean", 1.0), ("mean", 0.5), ("mean", 0.0), ("euler", 1.0)):
        states = []
        EulerMaruyama(3, Sigma(norm), "euler", method=method, dtype="float64")(field, X_1, RANDOM, trace=states.append)
        runs[method, norm] = states[0]
    full, half, none = (runs["mean", norm] - runs["mean", 0.0] for norm in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half, full / 2)
    assert none.abs().max() == 0 and not torch.allclose(runs["euler", 1.0], runs["mean", 1.0])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LinearMultistep(order=5), "sampler.order: expected 1 to 4, found 5"),
        (lambda: LinearMultistep(basis="lgsnr"), "Did you mean 'log_snr'"),
        (lambda: LinearMultistep(basis="snr")(Curved(), X_1, RANDOM), "sampler.end above 0"),
        (lambda: Euler(5, last_step_size=1.0)(Curved(), X_1, RANDOM), "sampler.last_step_size"),
        (lambda: Heun(5, last_step_size=0.0)(Curved(), X_1, RANDOM), "sampler.last_step_size"),
    ],
)
def test_wrong_options_are_one_line_with_the_key(make, says):
    with pytest.raises(UserError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)
