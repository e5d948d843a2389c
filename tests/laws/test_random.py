"""Randomness is a pure function of seed, serial number, stage and name."""

from __future__ import annotations

import pytest
import torch

from repalign.random import SampleRandom
from repalign.state import Streams

DRAWS = {
    "uniform": lambda r: r.uniform("a"),
    "integers": lambda r: r.integers("a", 3, 11),
    "normal": lambda r: r.normal("a", (2, 3)),
    "normal64": lambda r: r.normal("a", (2, 3), torch.float64),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_sample_draws_the_same_alone_and_in_any_batch(draw):
    whole = draw(SampleRandom(7, [0, 1, 5, 2**40]))
    torch.testing.assert_close(draw(SampleRandom(7, [5])), whole[2:3], rtol=0, atol=0)
    torch.testing.assert_close(draw(SampleRandom(7, [2**40, 0])), whole[[3, 0]], rtol=0, atol=0)
    again = SampleRandom(7, [0, 1, 5, 2**40])
    again.normal("b", (100,))  # what was drawn before does not matter
    torch.testing.assert_close(draw(again), whole, rtol=0, atol=0)


def test_seed_serial_stage_and_name_each_change_the_draw():
    base = SampleRandom(7, [3])
    x = base.normal("a", (4,))
    others = [SampleRandom(8, [3]), SampleRandom(7, [4]), base.at(1), base.at(2)]
    draws = [x, base.normal("b", (4,)), *(other.normal("a", (4,)) for other in others)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)
    torch.testing.assert_close(base.at(0).normal("a", (4,)), x, rtol=0, atol=0)


def test_ranges_moments_and_dtypes():
    random = SampleRandom(0, range(4000))
    uniform, integers, normal = random.uniform("u"), random.integers("i", 3, 7), random.normal("n", (4,))
    assert uniform.shape == (4000,) and 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
    assert sorted(set(integers.tolist())) == [3, 4, 5, 6] and integers.dtype == torch.int64
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert random.normal("n", (), torch.float64).dtype == torch.float64
    assert random.normal("n", (), torch.bfloat16).dtype == torch.bfloat16
    assert random.batch == 4000


def test_each_stream_of_a_state_has_its_own_noise():
    state = Streams(a=torch.zeros(2, 3), b=torch.zeros(2, 3))
    noise = SampleRandom(0, [0, 1]).normal_like("eps", state)
    assert not torch.equal(noise["a"], noise["b"])
    alone = SampleRandom(0, [1]).normal_like("eps", Streams(b=torch.zeros(1, 3)))
    torch.testing.assert_close(alone["b"], noise["b"][1:], rtol=0, atol=0)
