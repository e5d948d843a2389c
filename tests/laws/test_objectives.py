"""Training losses: shapes, minima, weights, gradients, precision."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn

from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.objectives.variational import VariationalDenoising, discretised_log_likelihood, gaussian_kl
from repalign.objectives.weighting import InverseVarianceWeight, LikelihoodWeight, RatioWeight
from repalign.paths.parametrization import Data, Noise, Score, Velocity, linear_drift
from repalign.paths.time import Uniform, UniformSteps
from repalign.paths.vp import DiscreteVPPath
from repalign.random import SampleRandom
from repalign.state import Cond, Draw, Output, Streams
from tests.laws.exact import PATHS, QUANTITIES, GaussianNetwork

TIMES = Uniform(0.02, 0.98)
RANDOM = SampleRandom(1, range(6))
X_0 = SampleRandom(2, range(6)).normal("data", (2, 4, 4), torch.float64)
PAIRS = list(product(PATHS, QUANTITIES))


class Linear(nn.Module):
    """A small trainable network with a variance head."""

    tap_specs = {}
    uses_carry = False

    def __init__(self, channels=2, variance_head=True):
        super().__init__()
        self.layer = nn.Conv2d(channels, 2 * channels, 1)
        self.variance_head = variance_head

    def forward(self, x_t, t, cond, *, taps=(), only_taps=False, carry=None):
        if only_taps:
            return Output()
        hidden = self.layer(x_t)
        pred, variance = (hidden + t.to(hidden).reshape(-1, 1, 1, 1)).chunk(2, 1)
        return Output(pred, {"variance": variance} if self.variance_head else {})


@pytest.mark.parametrize(("path", "quantity"), PAIRS)
def test_the_exact_prediction_of_a_point_has_no_loss(path, quantity):
    point = torch.full((6, 2, 4, 4), 0.5, dtype=torch.float64)
    objective = Denoising(PATHS[path], QUANTITIES[quantity], TIMES)
    draw = objective.draw(point, RANDOM)
    network = GaussianNetwork(PATHS[path], QUANTITIES[quantity], mean=0.5, std=0.0)
    loss = objective(network, point, Cond(), Draw(draw.t.double(), draw.eps)).losses["denoising"]
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("path", "quantity"), PAIRS)
def test_the_conditional_mean_is_the_minimum(path, quantity):
    # E[target | x_t] minimises the loss: moving the prediction either way makes it worse.
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.5 + 0.5 * torch.randn(3000, 1, dtype=torch.float64, generator=generator)
    eps = torch.randn(3000, 1, dtype=torch.float64, generator=generator)
    draw = Draw(torch.full((3000,), 0.5, dtype=torch.float64), eps)
    objective = Denoising(PATHS[path], QUANTITIES[quantity], TIMES)

    def loss(mean):
        network = GaussianNetwork(PATHS[path], QUANTITIES[quantity], mean=mean, std=0.5).requires_grad_(False)
        return float(objective(network, x_0, Cond(), draw).losses["denoising"].mean())

    assert loss(0.5) < min(loss(0.3), loss(0.7))


def test_loss_is_the_mean_square_and_belongs_to_its_sample():
    objective, network = Denoising(PATHS["linear"], Velocity(), Uniform()), Linear()
    x_0 = X_0.float()
    draw = objective.draw(x_0, RANDOM)
    step = objective(network, x_0, Cond(), draw)
    expected = ((step.output.pred - (draw.eps - x_0)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(step.losses["denoising"], expected)
    alone = objective.draw(x_0[4:5], SampleRandom(1, [4]))
    part = objective(network, x_0[4:5], Cond(), alone)
    torch.testing.assert_close(part.losses["denoising"], step.losses["denoising"][4:5])


def test_each_stream_has_its_loss():
    x_0 = Streams(image=X_0, token=X_0[:, 0, 0])
    objective = Denoising(PATHS["linear"], Velocity(), TIMES)
    draw = objective.draw(x_0, RANDOM)
    step = objective(GaussianNetwork(PATHS["linear"], Velocity()), x_0, Cond(), draw)
    assert set(step.losses) == {"denoising/image", "denoising/token"}
    alone = objective(GaussianNetwork(PATHS["linear"], Velocity()), X_0, Cond(), Draw(draw.t, draw.eps["image"]))
    torch.testing.assert_close(step.losses["denoising/image"], alone.losses["denoising"])


def test_each_stream_has_its_variational_bound():
    x_0 = Streams(image=X_0, token=X_0[:, 0, 0])
    objective = VariationalDenoising(PATHS["ddpm"], Noise(), UniformSteps(1000))
    draw = objective.draw(x_0, RANDOM)
    network = GaussianNetwork(PATHS["ddpm"], Noise(), variance_head=True)
    step = objective(network, x_0, Cond(), draw)
    assert set(step.losses) == {f"{term}/{name}" for term in ("denoising", "variational") for name in x_0}
    for name in x_0:
        alone = objective(network, x_0[name], Cond(), Draw(draw.t, draw.eps[name]))
        for term in ("denoising", "variational"):
            torch.testing.assert_close(step.losses[f"{term}/{name}"], alone.losses[term])


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_sit_weights_of_noise_and_score(path):
    draw = Draw(TIMES(RANDOM).double(), RANDOM.normal_like("eps", X_0))
    sample = PATHS[path].sample(X_0, draw.eps, draw.t)
    c = sample.coefficients
    g, noise_pred = linear_drift(c)[1], sample.eps + 0.1 * X_0
    base = ((noise_pred - sample.eps) ** 2).mean((1, 2, 3))

    class Fixed:
        tap_specs, uses_carry = {}, False

        def __init__(self, quantity):
            self.pred = quantity.read(Noise(), noise_pred, sample.x_t, c)

        def __call__(self, *args, **options):
            return Output(self.pred)

    for quantity in (Noise(), Score()):
        for error, weighting, expected in (
            (Noise(), None, base),
            (Velocity(), None, base * (g / c.sigma) ** 2),
            (Noise(), LikelihoodWeight(), base * g / c.sigma**2),
        ):
            objective = Denoising(PATHS[path], quantity, TIMES, weighting, error)
            loss = objective(Fixed(quantity), X_0, Cond(), draw).losses["denoising"]
            torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)


def test_taps_alone_have_no_loss():
    objective = Denoising(PATHS["linear"], Velocity(), TIMES)
    step = objective(Linear(), X_0.float(), Cond(), objective.draw(X_0.float(), RANDOM), only_taps=True)
    assert step.losses == {} and step.sample is not None


@pytest.mark.parametrize("quantity", [Noise(), Data(), Velocity()])
def test_loss_is_float32_around_a_half_precision_backbone(quantity):
    objective = VariationalDenoising(DiscreteVPPath(), quantity, UniformSteps())
    network, x_0 = Linear(), X_0.float()
    draw = objective.draw(x_0, RANDOM)
    with torch.autocast("cpu", torch.bfloat16):
        step = objective(network, x_0, Cond(), draw)
    assert step.output.pred.dtype == torch.bfloat16
    # Measured as another quantity, the prediction is converted in float32.
    other = Denoising(objective.path, quantity, UniformSteps(), error=Velocity() if quantity != Velocity() else Data())
    with torch.autocast("cpu", torch.bfloat16):
        found = other(network, x_0, Cond(), draw)
    read = other.error.read(quantity, found.output.pred.float(), found.sample.x_t, found.sample.coefficients)
    expected = ((read - other.error.target(found.sample)) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(found.losses["denoising"], expected)
    exact = objective(network, x_0, Cond(), draw)
    for name, loss in step.losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact.losses[name], rtol=0.05, atol=0.05)


def test_the_bound_trains_the_variance_alone_and_gradients_are_finite():
    path = DiscreteVPPath()
    objective, network = VariationalDenoising(path, Noise(), UniformSteps()), Linear()
    x_0 = X_0.float()
    draw = Draw(path.times[torch.tensor([0, 0, 1, 500, 998, 999])].float(), RANDOM.normal_like("eps", x_0))
    step = objective(network, x_0, Cond(), draw)
    assert set(step.losses) == {"denoising", "variational"}
    (bound,) = torch.autograd.grad(step.losses["variational"].mean(), network.layer.weight, retain_graph=True)
    (simple,) = torch.autograd.grad(step.losses["denoising"].mean(), network.layer.weight)
    assert torch.isfinite(bound).all() and torch.isfinite(simple).all()
    assert bound[:2].abs().max() == 0 and bound[2:].abs().max() > 0
    assert simple[:2].abs().max() > 0 and simple[2:].abs().max() == 0
    twice = VariationalDenoising(path, Noise(), UniformSteps(), variational_weight=2.0)(network, x_0, Cond(), draw)
    torch.testing.assert_close(twice.losses["variational"], 2 * step.losses["variational"])


def test_the_bound_is_the_likelihood_of_the_data_at_the_first_step():
    path = DiscreteVPPath()
    objective, network = VariationalDenoising(path, Noise(), UniformSteps()), Linear()
    x_0 = X_0.float().clamp(-1, 1)
    index = torch.tensor([0, 0, 0, 1, 400, 999])
    step = objective(network, x_0, Cond(), Draw(path.times[index].float(), RANDOM.normal_like("eps", x_0)))
    p, sample = path.posterior(index), step.sample
    mean = p.mean(Noise().data(step.output.pred, sample.x_t, sample.coefficients), sample.x_t)
    log_variance = p.learned_log_variance(step.output.heads["variance"])
    likelihood = -discretised_log_likelihood(x_0, mean, log_variance / 2).mean((1, 2, 3)) / math.log(2)
    posterior = torch.distributions.Normal(
        p.mean(x_0, sample.x_t), (0.5 * p.log_variance).exp().float().reshape(-1, 1, 1, 1).expand_as(x_0)
    )
    reverse = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    divergence = torch.distributions.kl_divergence(posterior, reverse).mean((1, 2, 3)) / math.log(2)
    expected = torch.cat([likelihood[:3], divergence[3:]])
    torch.testing.assert_close(step.losses["variational"], expected, rtol=1e-3, atol=1e-5)


def test_kl_is_that_of_torch():
    p = torch.distributions.Normal(X_0, torch.full_like(X_0, 0.7))
    q = torch.distributions.Normal(torch.zeros_like(X_0), torch.full_like(X_0, 1.3))
    found = gaussian_kl(p.mean, 2 * p.stddev.log(), q.mean, 2 * q.stddev.log())
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q))


def test_discretised_likelihood_sums_to_one():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in ((0.1, 0.3), (-0.9, 0.2), (2.0, 0.5)):
        log = discretised_log_likelihood(bins, torch.full_like(bins, mean), torch.full_like(bins, math.log(std)))
        assert float(log.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_wrong_pairs_are_one_line():
    with pytest.raises(UserError, match="path=ddpm"):
        VariationalDenoising(PATHS["linear"], Noise(), UniformSteps())
    objective = VariationalDenoising(DiscreteVPPath(), Noise(), UniformSteps())
    draw = objective.draw(X_0.float(), RANDOM)
    with pytest.raises(UserError, match=r"backbone\.variance_head=true"):
        objective(Linear(variance_head=False), X_0.float(), Cond(), draw)


def test_ratio_weights_are_bounded_where_they_say():
    t = torch.tensor([0.0, 0.05, 0.5, 1.0])
    c = PATHS["linear"].coefficients(t)
    assert RatioWeight()(c).tolist() == pytest.approx([float("inf"), 19, 1, 0])
    assert RatioWeight(low=5.0)(c).tolist() == pytest.approx([float("inf"), 19, 5, 5])
    assert RatioWeight(high=5.0)(c).tolist() == pytest.approx([5, 5, 1, 0])
    assert InverseVarianceWeight()(c).tolist() == pytest.approx([float("inf"), 400, 4, 1])
    with pytest.raises(UserError, match="low <= high"):
        RatioWeight(low=5.0, high=1.0)
