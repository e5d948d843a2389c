import pytest
import torch

from repalign.encoders.preprocess import EncoderInput

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 1.0)


def test_normalises_by_channel_and_leaves_the_right_size_alone():
    images = torch.rand(2, 3, 8, 8)
    expected = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    torch.testing.assert_close(EncoderInput(MEAN, STD, 8)(images), expected)


@pytest.mark.parametrize("antialias", [False, True])
def test_both_orders_agree_up_to_rounding(antialias):
    images = torch.rand(2, 3, 16, 16)
    first, second = (EncoderInput(MEAN, STD, 14, resize_first=r, antialias=antialias) for r in (True, False))
    torch.testing.assert_close(first(images), second(images))
    assert [step.__name__ for step in first.steps] == ["resize", "normalize"]
    assert [step.__name__ for step in second.steps] == ["normalize", "resize"]


def test_a_constant_stays_constant_and_bicubic_overshoots_unclamped():
    prepare = EncoderInput((0, 0, 0), (1, 1, 1), 14)
    torch.testing.assert_close(prepare(torch.full((1, 3, 16, 16), 0.7)), torch.full((1, 3, 14, 14), 0.7))
    edge = torch.zeros(1, 3, 16, 16)
    edge[..., 8:] = 1
    assert prepare(edge).max() > 1


def test_constants_stay_out_of_the_state_dict():
    assert EncoderInput(MEAN, STD, 8).state_dict() == {}
