"""Tokens at several times: reduces to one time, keeps groups apart, cuts groups by the stated rule."""

import pytest
import torch

from repalign.backbones.dit import DiT
from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.objectives.dual_timestep import DualTimestep, group_sizes
from repalign.paths.earlier import LessNoisyGroups
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.paths.tokens import TokenPath
from repalign.random import SampleRandom
from repalign.state import Cond, Draw

RANDOM = SampleRandom(0, range(3))
X_0, EPS = RANDOM.normal("data", (4, 8, 8)), RANDOM.normal("eps", (4, 8, 8))
COND = Cond(label=torch.arange(3))
PATH = TokenPath(LinearPath(), patch=2)


def backbone() -> DiT:
    torch.manual_seed(0)
    net = DiT((4, 8, 8), num_classes=10, patch=2, dim=16, depth=2, heads=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def objective(**options) -> DualTimestep:
    return DualTimestep(PATH, Velocity(), Uniform(), patch=2, **options)


def test_equal_times_are_one_time():
    t = torch.tensor([0.2, 0.5, 0.9])
    whole, tokens = LinearPath().sample(X_0, EPS, t), PATH.sample(X_0, EPS, t[:, None].expand(3, 16))
    assert torch.equal(whole.x_t, tokens.x_t)
    net = backbone()
    torch.testing.assert_close(net(whole.x_t, t, COND).pred, net(tokens.x_t, tokens.t, COND).pred)
    one = Denoising(LinearPath(), Velocity(), Uniform())(net, X_0, COND, Draw(t, EPS)).losses["denoising"]
    groups = torch.zeros(3, 16, dtype=torch.int64)
    many = objective()(net, X_0, COND, Draw(t[:, None], EPS, groups=groups)).losses["denoising"]
    torch.testing.assert_close(one, many)


def test_a_patch_is_as_noisy_as_its_token():
    t = torch.zeros(3, 16)
    t[:, 5] = 1  # row 1, column 1 of 4 x 4
    x_t = PATH.sample(X_0, EPS, t).x_t
    assert torch.equal(x_t[:, :, 2:4, 2:4], EPS[:, :, 2:4, 2:4])
    assert torch.equal(x_t[:, :, :2], X_0[:, :, :2])


def test_separated_groups_do_not_see_each_other():
    net, draw = backbone(), objective().draw(X_0, RANDOM)
    t = draw.t.gather(1, draw.groups)
    cond = Cond(label=COND.label, groups=draw.groups)
    first = (draw.groups == 0).reshape(3, 1, 4, 1, 4, 1).expand(3, 4, 4, 2, 4, 2).reshape(3, 4, 8, 8)
    changed = torch.where(first, X_0, X_0 + 1)
    apart = net(X_0, t, cond).pred - net(changed, t, cond).pred
    together = net(X_0, t, COND).pred - net(changed, t, COND).pred
    assert apart[first].abs().max() == 0
    assert together[first].abs().max() > 0


def test_the_draw_cuts_a_permutation_into_groups_of_the_stated_sizes():
    draw = objective(ratios=[0.25, 0.75]).draw(X_0, RANDOM)
    assert draw.t.shape == (3, 2) and not torch.equal(draw.t[:, 0], draw.t[:, 1])
    assert (draw.groups == 0).sum(1).tolist() == [4, 4, 4]
    assert not torch.equal(draw.groups[0], draw.groups[1])
    alone = objective(ratios=[0.25, 0.75]).draw(X_0[1:2], SampleRandom(0, [1]))
    assert torch.equal(alone.groups[0], draw.groups[1])


@pytest.mark.parametrize(
    ("ratios", "tokens", "sizes"),
    [((0.25, 0.75), 16, [4, 12]), ((0.3, 0.7), 16, [5, 11]), ((1 / 3, 1 / 3, 1 / 3), 16, [6, 5, 5]), ((1.0,), 5, [5])],
)
def test_largest_remainders_take_what_is_left(ratios, tokens, sizes):
    assert group_sizes(ratios, tokens) == sizes


def test_the_teacher_has_one_earlier_time_for_each_group():
    draw = objective().draw(X_0, RANDOM)
    earlier, own = LessNoisyGroups(0.2)(draw, RANDOM), draw.t.gather(1, draw.groups)
    assert (earlier <= own).all() and (earlier >= own - 0.2).all()
    for sample in range(3):
        for group in range(2):
            assert len(set(earlier[sample][draw.groups[sample] == group].tolist())) == 1


def test_shares_add_up_to_one():
    with pytest.raises(UserError, match="add up to 1"):
        objective(ratios=[0.25, 0.5])
