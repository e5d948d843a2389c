"""Paths, conversions between predictions, and the discrete chain."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from repalign.errors import UserError
from repalign.paths.interval import time_interval
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Noise, Velocity, linear_drift
from repalign.paths.schedules import kept_steps
from repalign.paths.vp import DiscreteVPPath, VPPath
from repalign.state import PathSample, Streams
from tests.laws.exact import PATHS, QUANTITIES

PAIRS = list(product(QUANTITIES, QUANTITIES))
INNER = torch.tensor([0.0103, 0.2504, 0.5001, 0.7305, 0.9706], dtype=torch.float64)


def _sample(path, streams=False, t=INNER):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(len(t), 2, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    if streams:
        x_0, eps = (Streams(image=x, token=x[:, 0]) for x in (x_0, eps))
    return path.sample(x_0, eps, t)


@pytest.mark.parametrize("name", PATHS)
def test_data_at_0_and_noise_at_1(name):
    path = PATHS[name]
    start, end = path.coefficients(torch.tensor(0.0)), path.coefficients(torch.tensor(1.0))
    assert start.alpha == 1 and start.sigma == 0
    # The variance-preserving paths keep a trace of the data at t = 1.
    assert end.alpha == 0 or (name in ("vp", "ddpm") and 0 < end.alpha < 0.01)
    assert end.sigma == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_those_of_autograd(name):
    t = INNER.clone().requires_grad_()
    c = PATHS[name].coefficients(t)
    for value, derivative in ((c.alpha, c.d_alpha), (c.sigma, c.d_sigma)):
        (gradient,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(gradient, derivative.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gvp", "vp", "ddpm"])
def test_variance_is_preserved_and_noise_grows(name):
    c = PATHS[name].coefficients(torch.linspace(0.001, 1, 200, dtype=torch.float64))
    torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(c.alpha))
    assert (c.sigma.diff() > 0).all() and (c.alpha.diff() < 0).all()


def test_linear_velocity_is_noise_minus_data():
    sample = _sample(LinearPath())
    torch.testing.assert_close(Velocity().target(sample), sample.eps - sample.x_0)
    torch.testing.assert_close(sample.x_t, (1 - INNER)[:, None, None] * sample.x_0 + INNER[:, None, None] * sample.eps)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("predicted", "wanted"), PAIRS)
def test_every_prediction_gives_every_quantity(name, predicted, wanted, streams):
    sample = _sample(PATHS[name], streams)
    source, goal = QUANTITIES[predicted], QUANTITIES[wanted]
    found = goal.read(source, source.target(sample), sample.x_t, sample.coefficients)
    expected = goal.target(sample)
    for a, b in zip(_parts(found), _parts(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def _parts(state):
    return list(state.values()) if isinstance(state, Streams) else [state]


@pytest.mark.parametrize("name", ["linear", "gvp"])
def test_a_velocity_converts_at_both_ends(name):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    sample = _sample(PATHS[name], t=ends)
    velocity, c = Velocity().target(sample), sample.coefficients
    torch.testing.assert_close(Velocity().data(velocity, sample.x_t, c), sample.x_0)
    torch.testing.assert_close(Velocity().noise(velocity, sample.x_t, c), sample.eps)
    torch.testing.assert_close(Velocity().score(velocity, sample.x_t, c)[1], -sample.eps[1])


def test_vp_drift_and_diffusion_are_half_beta():
    path = VPPath(0.2, 10.0)
    f, g = linear_drift(path.coefficients(INNER))
    beta = 0.2 + INNER * (10.0 - 0.2)
    torch.testing.assert_close(f, -beta / 2)
    torch.testing.assert_close(g, beta / 2)


def test_forward_diffusion_keeps_the_variance_of_the_path():
    # d(sigma^2)/dt = 2 f sigma^2 + 2 g for dx = f x dt + sqrt(2 g) dW around a fixed x_0.
    for path in PATHS.values():
        c = path.coefficients(INNER)
        f, g = linear_drift(c)
        torch.testing.assert_close(2 * c.sigma * c.d_sigma, 2 * f * c.sigma**2 + 2 * g)


def test_intervals_keep_away_from_divisions_by_zero():
    whole, both, vp = (0.0, 1.0), (1e-3, 1 - 1e-3), (1e-3, 1.0)
    for name, quantity in product(("linear", "gvp", "vp"), QUANTITIES):
        safe = time_interval(PATHS[name], QUANTITIES[quantity])
        expected = vp if name == "vp" else whole if quantity == "velocity" else both
        assert (safe.low, safe.high) == expected
    assert time_interval(PATHS["vp"], Noise(), train=True).low == 1e-5
    assert time_interval(PATHS["linear"], Noise(), train=True).low == 1e-3
    sde = time_interval(PATHS["linear"], Noise(), last_step_size=0.04)
    assert (sde.low, sde.high) == (0.04, 1 - 1e-3)
    assert time_interval(PATHS["linear"], Velocity(), margin=0.1).high == 1
    assert time_interval(PATHS["linear"], Noise(), margin=0.1).high == 0.9


def test_discrete_path_hits_its_tables_in_float32():
    path = DiscreteVPPath()
    index = torch.arange(1000)
    t = ((index + 1).float() / 1000).requires_grad_()
    c = path.coefficients(t)
    assert c.alpha.dtype == torch.float32
    torch.testing.assert_close(c.alpha, path.alphas_cumprod.sqrt().float(), rtol=0, atol=6e-8)
    assert path.step_of(t).tolist() == index.tolist()
    assert path.betas[0] == pytest.approx(1e-4, rel=1e-9) and path.betas[-1] == pytest.approx(0.02, rel=1e-9)


@pytest.mark.parametrize("spec", ["250", 7, "10,5,3", "ddim50", "1", ""])
def test_respacing_keeps_times_and_noise_levels(spec):
    whole, path = DiscreteVPPath(), DiscreteVPPath().respaced(spec)
    torch.testing.assert_close(path.alphas_cumprod, whole.alphas_cumprod[path.timestep_map], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cumprod(1 - path.betas, 0), path.alphas_cumprod, rtol=1e-12, atol=0)
    torch.testing.assert_close(path.times, (path.timestep_map + 1).double() / 1000)
    assert path.step_of(path.times).tolist() == list(range(len(path)))
    torch.testing.assert_close(path.coefficients(INNER).sigma, whole.coefficients(INNER).sigma)


def test_kept_steps_of_every_form():
    assert kept_steps(1000, "250")[0] == 0 and kept_steps(1000, "250")[-1] == 999
    assert len(kept_steps(1000, 250)) == 250
    assert kept_steps(10, "2,2") == [0, 4, 5, 9]
    assert kept_steps(10, "1") == [0]
    assert kept_steps(11, "2,3") == [0, 5, 6, 8, 10]
    assert kept_steps(1000, "ddim50") == list(range(0, 1000, 20))
    assert kept_steps(4, "") == [0, 1, 2, 3]


@pytest.mark.parametrize(("spec", "says"), [("ddim37", "37"), ("9", "9"), ("fast", "fast"), ("0", "0"), ("1,6", "1,6")])
def test_impossible_respacing_is_one_line(spec, says):
    with pytest.raises(UserError, match=says) as error:
        kept_steps(1000 if spec.startswith("ddim") else 8, spec)
    assert "\n" not in str(error.value) and "sampler.steps" in str(error.value)


def test_posterior_is_bayes():
    # q(x_{k-1} | x_k, x_0) from the joint Gaussian, for a respaced chain.
    path = DiscreteVPPath(100, "squaredcos_cap_v2").respaced(10)
    index = torch.arange(1, 10)
    p, before, beta = path.posterior(index), path.alphas_cumprod[index - 1], path.betas[index]
    precision = 1 / (1 - before) + (1 - beta) / beta
    torch.testing.assert_close(p.variance, 1 / precision)
    torch.testing.assert_close(p.weight_x_0, before.sqrt() / (1 - before) / precision)
    torch.testing.assert_close(p.weight_x_t, (1 - beta).sqrt() / beta / precision)
    first = path.posterior(torch.tensor(0))
    assert (
        first.variance == 0 and first.weight_x_0 == 1 and first.log_variance == path.posterior(index[:1]).log_variance
    )


def test_learned_variance_runs_between_posterior_and_beta():
    p = DiscreteVPPath().posterior(torch.tensor([3, 500]))
    low, middle, high = (p.learned_log_variance(torch.full((2, 1), value)) for value in (-1.0, 0.0, 1.0))
    torch.testing.assert_close(low[:, 0], p.log_variance.float())
    torch.testing.assert_close(high[:, 0], p.log_beta.float())
    torch.testing.assert_close(middle, (low + high) / 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiscreteVPPath(schedule="linaer"),
        lambda: DiscreteVPPath(steps=1),
        lambda: DiscreteVPPath(steps=10),
        lambda: VPPath(beta_min=0.0),
        lambda: VPPath(beta_min=3.0, beta_max=2.0),
    ],
)
def test_wrong_options_are_one_line_with_the_key(make):
    with pytest.raises(UserError, match="path") as error:
        make()
    assert "\n" not in str(error.value)


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        DiscreteVPPath(schedule="linaer")


def test_path_sample_carries_what_it_was_made_of():
    sample = _sample(PATHS["gvp"])
    assert isinstance(sample, PathSample) and sample.t is INNER
    assert math.isfinite(float(sample.coefficients.alpha.sum()))
