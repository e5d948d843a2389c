"""Times for training."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Noise, Velocity
from repalign.paths.time import (
    ArctanLogNormal,
    LogitNormal,
    Shifted,
    Uniform,
    UniformSteps,
    shift_time,
    uniform_within,
)
from repalign.paths.vp import VPPath
from repalign.random import SampleRandom
from tests.laws.exact import PATHS

RANDOM = SampleRandom(0, range(4000))
SAMPLERS = {
    "uniform": Uniform(),
    "interval": Uniform(0.25, 0.75),
    "logit_normal": LogitNormal(),
    "sd3": Shifted(LogitNormal(0.0, 1.0), 3.0),
    "arctan": ArctanLogNormal(),
    "steps": UniformSteps(1000),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_are_in_range_and_belong_to_their_sample(name):
    t = SAMPLERS[name](RANDOM)
    assert t.shape == (4000,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1 and t.std() > 0.05
    torch.testing.assert_close(SAMPLERS[name](SampleRandom(0, [17, 3])), t[[17, 3]], rtol=0, atol=0)


def test_uniform_stays_in_its_interval():
    t = SAMPLERS["interval"](RANDOM)
    assert 0.25 <= t.min() < 0.26 and 0.74 < t.max() < 0.75


@pytest.mark.parametrize(("sampler", "path"), [("logit_normal", "linear"), ("arctan", "gvp")])
def test_the_noise_to_data_ratio_is_log_normal(sampler, path):
    c = PATHS[path].coefficients(SAMPLERS[sampler](RANDOM))
    torch.testing.assert_close((c.sigma / c.alpha).log(), RANDOM.normal("t"), rtol=1e-3, atol=1e-3)


def test_steps_are_whole_and_never_clean_data():
    steps = SAMPLERS["steps"](RANDOM) * 1000
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.min() >= 1 and steps.max().round() == 1000
    assert set((UniformSteps(2)(RANDOM)).tolist()) == {0.5, 1.0}


def test_shift_keeps_the_ends_and_inverts():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert shift_time(t, 3.0)[[0, -1]].tolist() == [0, 1]
    assert (shift_time(t, 3.0)[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3), t)
    # Time turned round: a shift s of t is a shift 1/s of 1 - t.
    torch.testing.assert_close(1 - shift_time(1 - t, 3.0), shift_time(t, 1 / 3))
    assert torch.equal(shift_time(t, 1.0), t)


@pytest.mark.parametrize(
    "make", [lambda: Uniform(0.5, 0.5), lambda: Uniform(0, 1.5), lambda: UniformSteps(0), lambda: Shifted(Uniform(), 0)]
)
def test_wrong_options_are_one_line_with_the_key(make):
    with pytest.raises(UserError, match="time_sampler"):
        make()


@pytest.mark.parametrize(
    ("path", "parametrization", "ends"),
    [
        (LinearPath(), Velocity(), (0.0, 1.0)),
        (LinearPath(), Noise(), (1e-3, 1 - 1e-3)),
        (VPPath(), Velocity(), (1e-5, 1.0)),
    ],
)
def test_uniform_times_keep_away_from_singular_ends(path, parametrization, ends):
    sampler = uniform_within(path, parametrization)
    assert (sampler.low, sampler.high) == ends
    if ends == (0.0, 1.0):
        assert torch.equal(sampler(RANDOM), Uniform()(RANDOM))
