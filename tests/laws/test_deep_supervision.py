"""Deep supervision: the ladder of times, the second-order step and what each loss trains."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.objectives.deepflow import DeepSupervision, arrival
from repalign.paths.gvp import GVPPath
from repalign.paths.linear import LinearPath
from repalign.paths.time import Ladder, LogitNormal, Uniform
from repalign.random import SampleRandom
from repalign.state import Cond, Draw, Output, PathSample

RANDOM = SampleRandom(0, range(2000))


class Branches:
    """A backbone whose heads are given tensors."""

    tap_specs = {}
    uses_carry = False

    def __init__(self, velocities, accelerations):
        self.branches = len(velocities)
        self.heads = {f"velocity.{k}": v for k, v in enumerate(velocities[:-1], start=1)}
        self.heads |= {f"acceleration.{k}": a for k, a in enumerate(accelerations, start=1)}
        self.pred = velocities[-1]

    def __call__(self, x_t, t, cond, *, only_taps=False, **options):
        self.seen = x_t, t
        return Output() if only_taps else Output(self.pred, self.heads)


def latents(*names: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 4, 2, 2, generator=generator) for _ in names]


@pytest.mark.parametrize("base", [LogitNormal(), Uniform()])
def test_a_ladder_takes_tiny_steps_in_one_direction(base):
    t = Ladder(base, rungs=3, gap=0.01)(RANDOM)
    assert t.shape == (2000, 3)
    assert torch.equal(t[:, 0], base(RANDOM))
    assert t.min() >= 0 and t.max() <= 1
    steps = t.diff(dim=1)
    assert steps.abs().max() <= 0.01 + 1e-6
    assert (steps[:, 0] * steps[:, 1] >= 0).all()
    assert 0.45 < (steps[:, 0] > 0).float().mean() < 0.55
    assert abs(steps.abs().mean() - 0.005) < 3e-4
    assert not torch.equal(steps[:, 0].abs(), steps[:, 1].abs())


def test_the_times_of_a_sample_do_not_depend_on_its_batch():
    ladder = Ladder(Uniform(), rungs=4, gap=0.05)
    torch.testing.assert_close(ladder(SampleRandom(0, [17, 3])), ladder(RANDOM)[[17, 3]], rtol=0, atol=0)


def test_a_ladder_stays_between_data_and_noise():
    t = Ladder(Uniform(0.999, 1.0), rungs=3, gap=0.5)(RANDOM)
    assert t.max() == 1 and t.min() >= 0


@pytest.mark.parametrize(("rungs", "gap", "message"), [(0, 0.01, "rungs"), (2, -0.1, "gap")])
def test_ladders_that_make_no_sense_say_so(rungs, gap, message):
    with pytest.raises(UserError, match=f"time_sampler.{message}"):
        Ladder(Uniform(), rungs, gap)


def test_the_second_order_step_is_exact_at_constant_acceleration():
    x_0, b, c = latents("x_0", "slope", "acceleration")
    t = torch.tensor([0.2, 0.7, 1.0])
    wide = t.reshape(-1, 1, 1, 1)
    x_t = x_0 + b * wide + 0.5 * c * wide**2
    sample = PathSample(x_t, t, x_0, x_0, LinearPath().coefficients(t))
    torch.testing.assert_close(arrival(sample, b + c * wide, c), x_0)


@pytest.mark.parametrize("path", [LinearPath(), GVPPath()])
def test_true_velocities_have_no_denoising_loss_and_on_the_straight_path_need_no_acceleration(path):
    x_0, eps = latents("x_0", "eps")
    objective = DeepSupervision(path, Ladder(Uniform(0.1, 0.9), 3, 0.05), [0.2, 0.3, 1.0], 1.0)
    draw = Draw(t=Ladder(Uniform(0.1, 0.9), 3, 0.05)(SampleRandom(0, range(3))), eps=eps)
    velocities = []
    for t in draw.t.unbind(1):
        c = path.coefficients(t)
        d_alpha, d_sigma = (x.reshape(-1, 1, 1, 1) for x in (c.d_alpha, c.d_sigma))
        velocities.append(d_alpha * x_0 + d_sigma * eps)
    backbone = Branches(velocities, [torch.zeros_like(x_0)] * 2)
    step = objective(backbone, x_0, Cond(), draw)
    torch.testing.assert_close(step.losses["denoising"], torch.zeros(3), atol=1e-10, rtol=0)
    missed = step.losses["acceleration"].max()
    assert missed < 1e-10 if isinstance(path, LinearPath) else missed > 1e-3
    first = path.sample(x_0, eps, draw.t[:, 0])
    assert torch.equal(backbone.seen[0], first.x_t) and torch.equal(backbone.seen[1], draw.t)
    assert torch.equal(step.sample.t, draw.t[:, 0])


def test_losses_are_weighted_sums_over_branches():
    x_0, eps, *wrong = latents("x_0", "eps", "v_1", "v_2", "v_3", "a_1", "a_2")
    draw = Draw(t=torch.tensor([[0.3, 0.31, 0.32]]).repeat(3, 1), eps=eps)

    def losses(weights, acceleration_weight=1.0):
        objective = DeepSupervision(LinearPath(), Uniform(), weights, acceleration_weight)
        return objective(Branches(wrong[:3], wrong[3:]), x_0, Cond(), draw).losses

    parts = [losses(weights)["denoising"] for weights in ([1, 0, 0], [0, 1, 0], [0, 0, 1])]
    for part, v in zip(parts, wrong[:3], strict=True):
        torch.testing.assert_close(part, (v - (eps - x_0)).square().flatten(1).mean(1))
    torch.testing.assert_close(losses([0.2, 0.3, 1.0])["denoising"], 0.2 * parts[0] + 0.3 * parts[1] + parts[2])
    halved, whole = losses([1, 1, 1], 0.5)["acceleration"], losses([1, 1, 1])["acceleration"]
    torch.testing.assert_close(halved, 0.5 * whole)


def test_the_acceleration_loss_trains_accelerations_alone():
    x_0, eps, *heads = latents("x_0", "eps", "v_1", "v_2", "a_1")
    heads = [head.requires_grad_() for head in heads]
    objective = DeepSupervision(LinearPath(), Uniform(), [0.2, 1.0], 1.0)
    draw = Draw(t=torch.tensor([[0.5, 0.49]]).repeat(3, 1), eps=eps)
    losses = objective(Branches(heads[:2], heads[2:]), x_0, Cond(), draw).losses
    losses["acceleration"].sum().backward(retain_graph=True)
    assert heads[0].grad is None and heads[1].grad is None and heads[2].grad.abs().sum() > 0
    heads[2].grad = None
    losses["denoising"].sum().backward()
    assert heads[0].grad.abs().sum() > 0 and heads[1].grad.abs().sum() > 0 and heads[2].grad is None


def test_only_taps_has_no_losses():
    x_0, eps = latents("x_0", "eps")
    objective = DeepSupervision(LinearPath(), Ladder(Uniform(), 2, 0.01), [0.2, 1.0], 1.0)
    draw = objective.draw(x_0, SampleRandom(0, range(3)))
    step = objective(Branches([x_0, x_0], [x_0]), x_0, Cond(), draw, only_taps=True)
    assert step.losses == {} and step.sample is not None


def test_half_precision_heads_are_compared_in_float32():
    x_0, eps = latents("x_0", "eps")
    objective = DeepSupervision(LinearPath(), Uniform(), [0.2, 1.0], 1.0)
    draw = Draw(t=torch.tensor([[0.5, 0.49]]).repeat(3, 1), eps=eps)
    heads = [x_0.bfloat16()] * 3
    losses = objective(Branches(heads[:2], heads[2:]), x_0, Cond(), draw).losses
    assert all(loss.dtype == torch.float32 for loss in losses.values())
