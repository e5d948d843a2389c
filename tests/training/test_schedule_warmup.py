import pytest
import torch

from repalign.training.schedule import linear_warmup


def test_warm_up_then_constant():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = linear_warmup(optimizer, warmup=4)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([2e-6, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0], rel=1e-5)
    schedule = linear_warmup(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0), warmup=0)
    assert schedule.get_last_lr() == [2.0]
