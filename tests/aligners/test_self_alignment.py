"""SRA and LayerSync: which time, noise, conditions and gradients their targets have."""

import copy
from functools import partial

import pytest
import torch

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import TwoLayerHead, no_head
from repalign.aligners.self_target import SelfTarget
from repalign.aligners.similarities import L1, L2, ChannelCosine, Cosine, SmoothL1
from repalign.aligners.teacher import TeacherTarget
from repalign.aligners.weights import LateDecay
from repalign.backbones.dit import DiT
from repalign.conditioners.label import LabelConditioner
from repalign.errors import UserError
from repalign.objectives.denoising import Denoising
from repalign.paths.earlier import LessNoisy, LessNoisySteps
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform, UniformSteps
from repalign.random import SampleRandom
from repalign.state import Draw, TokenSpec
from repalign.training.step import draw_of, losses_at, total_of, training_losses

RANDOM = SampleRandom(0, range(8))
PATH = LinearPath()


def backbone() -> DiT:
    torch.manual_seed(0)
    net = DiT((4, 8, 8), num_classes=10, patch=2, dim=16, depth=4, heads=2)
    for parameter in net.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def sra(net: DiT, width: float = 0.2, **options) -> Aligner:
    return Aligner(
        tap="block.1",
        target=TeacherTarget("block.3", PATH, LessNoisy(width), **options),
        head=partial(TwoLayerHead, expansion=2),
        similarities=[(1.0, SmoothL1(0.05))],
        weight=0.2,
        tap_specs=net.tap_specs,
        features={},
    )


def sync(net: DiT, tap: int, target: int, **options) -> Aligner:
    return Aligner(
        tap=f"block.{tap}",
        target=SelfTarget(f"block.{target}", **options),
        head=no_head,
        similarities=[(1.0, Cosine())],
        weight=0.2,
        tap_specs=net.tap_specs,
        features={},
    )


def step_parts(net: DiT, teacher=None, drop: float = 0.5) -> dict:
    return {
        "backbone": net,
        "objective": Denoising(PATH, Velocity(), Uniform()),
        "conditioner": LabelConditioner(10, drop),
        "encoders": {},
        "x_0": RANDOM.normal("data", (4, 8, 8)),
        "batch": {"label": torch.arange(8)},
        "teacher": teacher,
        "random": RANDOM,
    }


class Recorder:
    """A teacher that keeps what it was given."""

    def __init__(self, net: DiT) -> None:
        self.net = net

    def __call__(self, x_t, t, cond, **options):
        self.x_t, self.t, self.cond, self.options = x_t, t, cond, options
        return self.net(x_t, t, cond, **options)


def test_the_teacher_sees_the_same_noise_earlier_and_the_same_dropped_labels():
    net = backbone()
    teacher = Recorder(copy.deepcopy(net))
    parts = step_parts(net, teacher)
    draw = draw_of(parts["objective"], parts["conditioner"], parts["x_0"], RANDOM)
    losses_at(draw, aligners={"sra": sra(net)}, **parts)
    assert (teacher.t <= draw.t).all() and (teacher.t >= draw.t - 0.2).all() and (teacher.t < draw.t).any()
    torch.testing.assert_close(teacher.x_t, PATH.sample(parts["x_0"], draw.eps, teacher.t).x_t)
    assert draw.drop["label"].any() and (teacher.cond.label[draw.drop["label"]] == 10).all()
    assert teacher.options == {"taps": ("block.3",), "only_taps": True}


def test_the_teacher_may_see_the_labels_before_dropping():
    net = backbone()
    teacher = Recorder(copy.deepcopy(net))
    parts = step_parts(net, teacher)
    draw = draw_of(parts["objective"], parts["conditioner"], parts["x_0"], RANDOM)
    losses_at(draw, aligners={"sra": sra(net, dropped=False)}, **parts)
    assert torch.equal(teacher.cond.label, torch.arange(8))


def test_no_gradient_reaches_the_teacher_nor_student_layers_after_the_tap():
    net = backbone()
    teacher = copy.deepcopy(net)
    parts = step_parts(net, teacher)
    term = sra(net)
    draw = draw_of(parts["objective"], parts["conditioner"], parts["x_0"], RANDOM)
    losses_at(draw, aligners={"sra": term}, **parts)["align/sra"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is None for p in net.blocks[1:].parameters())
    assert all(p.grad.abs().sum() > 0 for p in (*net.blocks[0].parameters(), *term.head.parameters()))


def test_layer_sync_moves_the_shallow_layers_alone():
    net = backbone()
    parts = step_parts(net)
    draw = draw_of(parts["objective"], parts["conditioner"], parts["x_0"], RANDOM)
    losses_at(draw, aligners={"sync": sync(net, 1, 3)}, **parts)["align/sync"].backward()
    assert all(p.grad is None for p in net.blocks[1:].parameters())
    assert all(p.grad.abs().sum() > 0 for p in net.blocks[0].parameters())


def test_without_the_stop_the_deep_layer_moves_too():
    net = backbone()
    parts = step_parts(net)
    draw = draw_of(parts["objective"], parts["conditioner"], parts["x_0"], RANDOM)
    losses_at(draw, aligners={"sync": sync(net, 1, 3, detach=False)}, **parts)["align/sync"].backward()
    assert all(p.grad.abs().sum() > 0 for p in net.blocks[1:3].parameters())
    assert all(p.grad is None for p in net.blocks[3].parameters())


def test_several_pairs_add_up_in_one_pass():
    net = backbone()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    pairs = {"a": sync(net, 1, 3), "b": sync(net, 2, 4)}
    losses = training_losses(aligners=pairs, **step_parts(net))
    terms = losses.terms
    torch.testing.assert_close(losses.total, terms["denoising"] + 0.2 * (terms["align/a"] + terms["align/b"]))
    assert len(calls) == 1


def test_the_weight_may_follow_the_step():
    net = backbone()
    term = sync(net, 1, 3)
    term.weight = LateDecay(0.2, hold=2, tenfold=4, epoch=10)
    terms = {"denoising": torch.tensor(1.0), "align/sync": torch.tensor(1.0)}
    for step, weight in ((0, 0.2), (29, 0.2), (30, 0.2 * 10**-0.25), (69, 0.2 * 10**-1), (70, 0.2 * 10**-1.25)):
        assert total_of(terms, {"sync": term}, step).item() == pytest.approx(1 + weight)
    with pytest.raises(AssertionError, match="does not say its step"):
        total_of(terms, {"sync": term})


def test_earlier_steps_stay_on_the_chain_and_end_at_step_one():
    t = UniformSteps(1000)(RANDOM)
    step = (LessNoisySteps(200, 1000)(Draw(t=t), RANDOM) * 1000).round() - 1
    own = (t * 1000).round() - 1
    assert (step <= own).all() and (step >= own - 199).all() and (step >= 1).all()
    lowest = LessNoisySteps(200, 1000)(Draw(t=torch.full((8,), 1 / 1000)), RANDOM)
    torch.testing.assert_close(lowest, torch.full((8,), 2 / 1000))


@pytest.mark.parametrize("distance", [SmoothL1(0.05), L1(), L2(), ChannelCosine()])
def test_distances_vanish_at_equality_and_grow(distance):
    x = torch.randn(3, 16, 6)
    torch.testing.assert_close(distance(x, x), torch.zeros(3), atol=1e-6, rtol=0)
    assert (distance(x, -x) > 0.5).all()


def test_smooth_l1_is_quadratic_inside_beta_and_linear_outside():
    zero = torch.zeros(1, 1, 1)
    assert SmoothL1(0.5)(zero + 0.1, zero).item() == pytest.approx(0.01)
    assert SmoothL1(0.5)(zero + 2.0, zero).item() == pytest.approx(1.75)


def test_the_cosine_over_tokens_is_the_cosine_of_the_transposed():
    x, y = torch.randn(3, 16, 6), torch.randn(3, 16, 6)
    torch.testing.assert_close(ChannelCosine()(x, y), 1 + Cosine()(x.transpose(1, 2), y.transpose(1, 2)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (SelfTarget("block.9"), r"aligner.target.tap: unknown tap of this backbone 'block.9'"),
        (TeacherTarget("blok.3", PATH, LessNoisy(0.2)), r"'blok.3'. Did you mean 'block.3'"),
    ],
)
def test_unknown_layers_are_named(target, message):
    with pytest.raises(UserError, match=message):
        target.spec(backbone().tap_specs, {})


def test_layers_of_two_widths_need_a_head():
    taps = {"a": TokenSpec(8, (4, 4)), "b": TokenSpec(16, (4, 4))}
    with pytest.raises(UserError, match="width 8 and target of width 16"):
        Aligner("a", SelfTarget("b"), no_head, [(1.0, Cosine())], 0.2, tap_specs=taps, features={})
