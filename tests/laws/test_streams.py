"""A state of several streams computes like each of its tensors."""

from __future__ import annotations

import pytest
import torch

from repalign.paths.interpolant import scale
from repalign.state import Cond, Streams, Tokens, concatenate, expand, leading, mean_per_sample

A = Streams(image=torch.arange(24.0).reshape(2, 3, 2, 2), token=torch.arange(10.0).reshape(2, 5))
B = A.map(lambda x: x + 1)
T = torch.tensor([0.25, 2.0])


@pytest.mark.parametrize(
    "compute",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: -a,
        lambda a, b: 2 * a + 1 - b / 4,
        lambda a, b: 1 - a,
        lambda a, b: scale(T, a) + b,
        lambda a, b: expand(T, a) * b,
        lambda a, b: torch.tensor(0.5, dtype=torch.float64) * a,
        lambda a, b: scale(torch.tensor(0.5, dtype=torch.float64), a) - b,
        lambda a, b: concatenate(a, b),
        lambda a, b: mean_per_sample(a * b),
    ],
)
def test_arithmetic_is_entry_wise(compute):
    result = compute(A, B)
    assert isinstance(result, Streams)
    for name in A:
        expected = compute(A[name], B[name])
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(result[name], expected, rtol=0, atol=0)


def test_streams_of_other_names_do_not_mix():
    with pytest.raises(KeyError, match="image"):
        A + Streams(image=A["image"])


def test_scale_multiplies_each_sample_by_its_own_number():
    torch.testing.assert_close(scale(T, A)["token"][1], 2 * A["token"][1])
    torch.testing.assert_close(scale(T, A)["image"][0], 0.25 * A["image"][0])
    assert leading(A) is A["image"]


def test_dropped_rows_take_the_null_condition():
    cond = Cond(torch.tensor([1, 2]), Tokens(torch.ones(2, 3, 4)), torch.ones(2, 5))
    null = Cond(torch.tensor([9, 9]), Tokens(torch.zeros(2, 3, 4)), torch.zeros(2, 5))
    mixed = cond.where(torch.tensor([False, True]), null)
    assert mixed.label.tolist() == [1, 9]
    assert mixed.text.data.sum((1, 2)).tolist() == [12, 0] and mixed.pooled.sum(1).tolist() == [5, 0]
    both = cond.concatenate(null)
    assert both.label.tolist() == [1, 2, 9, 9] and both.text.data.shape == (4, 3, 4)
