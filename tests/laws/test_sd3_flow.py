"""SD3's densities of times, its second-order sampler, skip-layer guidance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance
from repalign.guidance.skip_layer import SkipLayerGuidance, interval_of_steps
from repalign.objectives.weighting import CosMapWeight
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Noise, Velocity
from repalign.paths.time import CosMap, LogitNormal, Mode, Uniform
from repalign.random import SampleRandom
from repalign.samplers.euler import Euler
from repalign.samplers.field import DenoisingField
from repalign.samplers.flow_dpm import FlowDPMSolver2M
from repalign.samplers.grid import time_grid
from repalign.state import Cond
from tests.laws.exact import PATHS, GaussianNetwork, exact_field

RANDOM = SampleRandom(0, range(20000))
FEW = SampleRandom(3, range(3))
X_1 = FEW.normal("x_1", (4, 2, 2), torch.float64)
COND, NULL = Cond(torch.tensor([1, 2, 3])), Cond(torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("sampler", [LogitNormal(), LogitNormal(0.5, 0.6), CosMap()])
def test_a_density_is_what_is_drawn(sampler):
    """Its integral over an interval is the share of the times that fall there."""
    t = sampler(RANDOM).double()
    for low, high in ((0.1, 0.3), (0.3, 0.6), (0.7, 0.95)):
        grid = torch.linspace(low, high, 2001, dtype=torch.float64)
        area = torch.trapezoid(sampler.density(grid), grid)
        share = ((t >= low) & (t < high)).double().mean()
        torch.testing.assert_close(share, area, atol=0.012, rtol=0)


def test_mode_is_uniform_at_zero_and_favours_the_middle_above():
    u = Uniform()(RANDOM)
    torch.testing.assert_close(Mode(0.0)(RANDOM), 1 - u)
    for scale, wider in ((1.29, False), (-0.5, True)):
        t = Mode(scale)(RANDOM)
        assert t.min() >= 0 and t.max() <= 1
        torch.testing.assert_close(t.mean(), torch.tensor(0.5), atol=0.01, rtol=0)
        assert (t.std() > u.std()) == wider
    with pytest.raises(UserError, match=r"time_sampler.scale: expected -1 to 1.7519, found 1.8"):
        Mode(1.8)


def test_a_weight_on_uniform_times_is_the_density():
    t = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(CosMapWeight()(LinearPath().coefficients(t)), CosMap.density(t))


def test_a_point_is_reached_exactly_by_any_number_of_steps():
    for steps in (1, 2, 7):
        field = exact_field(PATHS["linear"], Velocity(), mean=0.5, std=0.0)
        out = FlowDPMSolver2M(steps, dtype="float64", last_step_size=0.01 if steps > 1 else None)(field, X_1, FEW)
        torch.testing.assert_close(out, torch.full_like(out, 0.5))


def test_second_order_and_better_than_euler():
    """Halving the steps quarters the error, up to the first and the last step."""
    field = exact_field(PATHS["linear"], Velocity(), mean=0.5, std=0.5)
    # x_0 = mean + (x_1 - alpha mean) std / sqrt(var) along the ODE of Gaussian data; at t = 1 the variance is 1.
    exact = 0.5 + 0.5 * X_1

    def error(sampler):
        return (sampler(field, X_1, FEW) - exact).abs().max().item()

    errors = [error(FlowDPMSolver2M(steps, dtype="float64", shift=0.5)) for steps in (50, 100, 200)]
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert min(orders) > 1.7, orders
    assert errors[0] < error(Euler(50, dtype="float64", shift=0.5)) / 3


def test_the_rest_of_a_grid():
    field = exact_field(PATHS["linear"], Noise(), mean=0.5, std=0.5)
    for make in (Euler, FlowDPMSolver2M):
        states = [X_1]
        whole = make(8, dtype="float64")(field, X_1, FEW, trace=states.append)
        if make is Euler:  # the other one remembers the step before
            torch.testing.assert_close(make(8, dtype="float64", skip=3)(field, states[3], FEW), whole)
        with pytest.raises(UserError, match=r"sampler.skip: expected 0 to 7 \(sampler.steps=8\), found 8"):
            make(8, skip=8)(field, X_1, FEW)


class SkippingNetwork(GaussianNetwork):
    """Without its second block it predicts something else."""

    skips_blocks = True

    def forward(self, x_t, t, cond, **options):
        out = super().forward(x_t, t, cond, **options)
        return replace(out, pred=out.pred + 1.0) if 2 in cond.skip else out


def _bind(network):
    return lambda cond: DenoisingField(network, PATHS["linear"], network.quantity, cond)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_skip_layer_guidance_moves_away_from_the_weaker_prediction(scale):
    network = SkippingNetwork(PATHS["linear"], Velocity()).requires_grad_(False)
    field = SkipLayerGuidance(scale, 2.5, [2], (0.4, 0.6))(_bind(network), COND, NULL)
    plain = ClassifierFreeGuidance(scale)(_bind(network), COND, NULL)
    for t, inside in ((0.3, False), (0.4, True), (0.5, True), (0.6, True), (0.7, False)):
        at = torch.tensor(t, dtype=torch.float64)
        network.calls.clear()
        out = field(X_1, at).pred
        assert [size for size, _ in network.calls] == [3 if scale == 1 else 6, *([3] if inside else [])]
        torch.testing.assert_close(out, plain(X_1, at).pred - (2.5 if inside else 0.0))
    later = field.during(torch.tensor(0.5, dtype=torch.float64))  # a step's start decides for the whole step
    torch.testing.assert_close(later(X_1, at).pred, plain(X_1, at).pred - 2.5)


def test_a_backbone_that_cannot_skip_says_so():
    network = GaussianNetwork(PATHS["linear"], Velocity()).requires_grad_(False)
    field = SkipLayerGuidance(1.0, 2.5, [2])(_bind(network), COND, NULL)
    with pytest.raises(UserError, match=r"guidance.layers: this backbone cannot pass over blocks"):
        field(X_1, torch.tensor(0.5))


def test_the_official_fractions_of_steps_as_times():
    times = time_grid(1.0, 0.0, 50)
    low, high = interval_of_steps(times, 0.01, 0.2)
    assert (low, high) == (float(times[9]), float(times[1]))
    assert interval_of_steps(times, 0.5, 0.5) is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": []}, r"guidance.layers: expected numbers of blocks from 1, found \[\]"),
        ({"layers": [0]}, "guidance.layers"),
        ({"layers": [1], "interval": (0.5, 0.2)}, "guidance.interval"),
    ],
)
def test_wrong_options_name_their_key(options, match):
    with pytest.raises(UserError, match=match):
        SkipLayerGuidance(4.0, 2.5, **options)
