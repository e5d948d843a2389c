from functools import partial
from types import SimpleNamespace

import pytest
import torch

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import MLPHead
from repalign.aligners.similarities import Cosine, CosineDistance
from repalign.aligners.targets import BilinearTarget, EncoderTarget
from repalign.errors import UserError
from repalign.state import Output, Step, Tokens, TokenSpec

TAPS = {"block.1": TokenSpec(8, (4, 4)), "block.2": TokenSpec(8, (4, 4))}


def aligner(grid=(4, 4), prefix=0, **options) -> Aligner:
    return Aligner(
        **{
            "tap": "block.2",
            "target": EncoderTarget(),
            "head": partial(MLPHead, hidden=16),
            "similarities": [(1.0, Cosine())],
            "weight": 0.5,
            "tap_specs": TAPS,
            "features": {"main": TokenSpec(6, grid, prefix)},
            **options,
        }
    )


def context(student: torch.Tensor, target: Tokens):
    step = Step({}, Output(taps={"block.2": Tokens(student, (4, 4))}))
    return SimpleNamespace(step=step, features=lambda name: target)


def test_perfect_alignment_costs_minus_one_and_opposite_costs_one():
    x = torch.randn(3, 16, 6)
    torch.testing.assert_close(Cosine()(x, 5 * x), -torch.ones(3))
    torch.testing.assert_close(Cosine()(x, -x), torch.ones(3))


def test_loss_is_per_sample_and_differentiable_through_the_tap_alone():
    term = aligner()
    student = torch.randn(3, 16, 8, requires_grad=True)
    target = torch.randn(3, 16, 6, requires_grad=True)
    loss = term(context(student, Tokens(target, (4, 4))))
    assert loss.shape == (3,)
    loss.mean().backward()
    assert student.grad.abs().sum() > 0
    assert target.grad is None
    assert all(p.grad.abs().sum() > 0 for p in term.head.parameters())


def test_prefix_tokens_of_the_encoder_are_dropped():
    term = aligner(prefix=1)
    student, target = torch.randn(2, 16, 8), torch.randn(2, 17, 6)
    with_prefix = term(context(student, Tokens(target, (4, 4), prefix=1)))
    without = term(context(student, Tokens(target[:, 1:], (4, 4))))
    torch.testing.assert_close(with_prefix, without)


@pytest.mark.parametrize(("resize", "grid"), [("student", (2, 2)), ("target", (2, 2)), ("target", (8, 8))])
def test_grids_can_be_matched_on_demand(resize, grid):
    term = aligner(grid=grid, resize=resize)
    loss = term(context(torch.randn(2, 16, 8), Tokens(torch.randn(2, grid[0] * grid[1], 6), grid)))
    assert loss.shape == (2,)
    assert torch.isfinite(loss).all()


def test_normalisation_is_float32_under_autocast():
    term = aligner()
    student, target = torch.randn(2, 16, 8), Tokens(torch.randn(2, 16, 6), (4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert term(context(student, target)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tap": "block.3"}, r"aligner.tap: unknown tap of this backbone 'block.3'. Did you mean 'block"),
        ({"target": EncoderTarget("mian")}, r"unknown encoder.* 'mian'. Did you mean 'main'"),
        ({"grid": (2, 2)}, r"grid of 4 x 4 tokens but the target has 2 x 2"),
    ],
)
def test_wrong_pairs_say_which_two(options, message):
    with pytest.raises(UserError, match=message):
        aligner(**options)


def test_cosine_distance_is_one_more_than_the_negative_cosine():
    x, y = torch.randn(2, 3, 16, 6)
    torch.testing.assert_close(CosineDistance()(x, y), 1 + Cosine()(x, y))
    torch.testing.assert_close(CosineDistance()(x, 5 * x), torch.zeros(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("grid", "prefix"), [((8, 8), 0), ((2, 2), 0), ((6, 6), 1), ((4, 4), 1)])
def test_a_bilinear_target_has_the_taps_grid(grid, prefix):
    target = BilinearTarget(EncoderTarget(), "block.2")
    term = aligner(grid=grid, prefix=prefix, target=target)
    features = torch.randn(2, prefix + grid[0] * grid[1], 6)
    found = target(context(torch.randn(2, 16, 8), Tokens(features, grid, prefix)))
    assert found.grid == (4, 4) and found.data.shape == (2, 16, 6) and found.prefix == 0
    image = features[:, prefix:].transpose(1, 2).unflatten(2, grid)
    expected = torch.nn.functional.interpolate(image, scale_factor=4 / grid[0], mode="bilinear")
    torch.testing.assert_close(found.data, expected.flatten(2).transpose(1, 2))
    assert term(context(torch.randn(2, 16, 8), Tokens(features, grid, prefix))).shape == (2,)


def test_a_bilinear_target_needs_a_tap_and_grids():
    with pytest.raises(UserError, match="Did you mean 'block.2'"):
        aligner(target=BilinearTarget(EncoderTarget(), "blok.2"))
    with pytest.raises(UserError, match="needs two grids"):
        aligner(target=BilinearTarget(EncoderTarget(), "block.2"), features={"main": TokenSpec(6)})
