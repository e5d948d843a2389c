"""Diffusion-DPO: its start, its numbers, what it is made of, what it refuses."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.objectives.diffusion_dpo import DiffusionDPO
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Noise, Velocity
from repalign.paths.time import Uniform, UniformSteps
from repalign.paths.vp import DiscreteVPPath
from repalign.random import SampleRandom
from repalign.state import Cond, Output, Streams

PAIRS = 3
RANDOM = SampleRandom(1, [*range(PAIRS), *range(PAIRS)])
X_0 = SampleRandom(2, range(2 * PAIRS)).normal("data", (2, 4, 4))
KINDS = {
    "flow": lambda: (LinearPath(), Velocity(), Uniform()),
    "eps": lambda: (DiscreteVPPath(), Noise(), UniformSteps(1000)),
}


class Network(nn.Module):
    tap_specs = {}
    uses_carry = False

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x_t, t, cond, *, taps=(), only_taps=False, carry=None):
        pred = self.layer(x_t.latent if isinstance(x_t, Streams) else x_t)
        return Output(None if only_taps else pred)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_its_reference_has_the_loss_of_a_coin(kind):
    network = Network(0)
    objective = DiffusionDPO(*KINDS[kind](), beta=2000.0, reference=nullcontext)
    step = objective(network, X_0, Cond(), objective.draw(X_0, RANDOM))
    assert torch.equal(step.losses["dpo"], torch.full((PAIRS,), math.log(2.0)))
    assert not step.figures["margin"].any() and not step.figures["accuracy"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_denoising_errors(kind):
    policy, reference = Network(0), Network(1)
    objective = DiffusionDPO(*KINDS[kind](), beta=3.0, reference=lambda backbone: nullcontext(reference))
    draw = objective.draw(X_0, RANDOM)
    step = objective(policy, X_0, Cond(), draw)
    plain = Denoising(*KINDS[kind]())
    now, before = (plain(net, X_0, Cond(), draw).losses["denoising"].reshape(2, -1) for net in (policy, reference))
    margin = -1.5 * ((now[0] - before[0]) - (now[1] - before[1]))
    torch.testing.assert_close(step.figures["margin"], margin)
    torch.testing.assert_close(step.losses["dpo"], torch.log1p(torch.exp(-margin)))
    step.losses["dpo"].sum().backward()
    assert policy.layer.weight.grad.any() and reference.layer.weight.grad is None

    # To learn from the loss moves the errors apart, in the direction of what is preferred.
    with torch.no_grad():
        for weight in policy.parameters():
            weight -= 1e-3 * weight.grad
    after = objective(policy, X_0, Cond(), draw)
    assert after.losses["dpo"].sum() < step.losses["dpo"].sum()
    assert after.figures["margin"].sum() > step.figures["margin"].sum()


def test_both_of_a_pair_have_one_time_and_one_noise():
    objective = DiffusionDPO(*KINDS["flow"](), beta=1.0, reference=nullcontext)
    draw = objective.draw(X_0, SampleRandom(1, range(2 * PAIRS)))  # even where their serial numbers are not the same
    assert torch.equal(draw.t[:PAIRS], draw.t[PAIRS:]) and torch.equal(draw.eps[:PAIRS], draw.eps[PAIRS:])
    assert len(draw.t.unique()) == PAIRS


def test_taps_alone_have_no_loss():
    objective = DiffusionDPO(*KINDS["flow"](), beta=1.0, reference=nullcontext)
    assert not objective(Network(0), X_0, Cond(), objective.draw(X_0, RANDOM), only_taps=True).losses


def test_mistakes():
    with pytest.raises(UserError, match=r"objective\.beta: expected a positive number, found 0"):
        DiffusionDPO(*KINDS["flow"](), beta=0, reference=nullcontext)
    objective = DiffusionDPO(*KINDS["flow"](), beta=1.0, reference=nullcontext)
    with pytest.raises(UserError, match="takes pairs, found a batch of 5; set data=pairs_folder"):
        objective.draw(X_0[:5], SampleRandom(1, range(5)))
