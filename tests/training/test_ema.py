import pytest
import torch
from torch import nn

from repalign.training.ema import EMA


def test_formula_starts_from_a_copy():
    live = nn.Linear(2, 2)
    ema = EMA(live, decay=0.9)
    begin = live.weight.detach().clone()
    with torch.no_grad():
        live.weight += 1
    ema.update(live, 0)
    torch.testing.assert_close(ema.module.weight, 0.9 * begin + 0.1 * (begin + 1))


def test_float_buffers_are_averaged_and_integers_copied():
    live = nn.BatchNorm1d(2)
    ema = EMA(live, decay=0.5)
    live(torch.randn(8, 2) + 4)
    ema.update(live, 0)
    torch.testing.assert_close(ema.module.running_mean, 0.5 * live.running_mean)
    assert ema.module.num_batches_tracked == live.num_batches_tracked == 1


def test_warmup_follows_the_live_weights_at_first():
    ema = EMA(nn.Linear(1, 1), decay=0.999, warmup=True)
    assert [ema.decay_at(n) for n in (0, 10, 10**6)] == [0.1, 0.55, 0.999]


def test_stays_in_float32_and_frozen():
    ema = EMA(nn.Linear(2, 2).bfloat16())
    assert ema.module.weight.dtype == torch.float32
    assert not any(p.requires_grad for p in ema.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="ema.decay"):
        EMA(nn.Linear(1, 1), decay)
