"""Refused gradients change nothing; what is refused follows from the norms alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from repalign.training.watch import FLOOR, GradientWatch, moving_buffers

OPTIMIZERS = {
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "plain AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
}


def everything(net, optimizer):
    """Weights and the optimizer's state, as copies."""
    state = [v.clone() for s in optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v)]
    return [*(p.detach().clone() for p in net.parameters()), *state]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_refused_step_changes_neither_weights_nor_moments(make, value):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    optimizer, watch = make(net.parameters()), GradientWatch()
    straight, its_optimizer = copy.deepcopy(net), None
    its_optimizer = make(straight.parameters())
    for step in range(8):
        x = torch.randn(4, 3)
        for network, optim in ((net, optimizer), (straight, its_optimizer)):
            optim.zero_grad()
            (network(x).square().mean() * (value if step in (0, 3, 4) and network is net else 1)).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        nn.utils.clip_grad_norm_(straight.parameters(), 1.0)
        watch.hold(optimizer, norm)
        before = everything(net, optimizer)
        optimizer.step()
        if step in (0, 3, 4):
            # A first step makes the moments: of zeros, where the optimizer makes them at all.
            assert all(torch.equal(a, b) for a, b in zip(before, everything(net, optimizer), strict=False))
        else:
            its_optimizer.step()  # has never met the bad batches
        watch.settle([])
    assert float(watch.refused) == 3
    assert all(
        torch.equal(a, b) for a, b in zip(everything(net, optimizer), everything(straight, its_optimizer), strict=True)
    )


def refusals(norms, **options):
    """What the watch says to a row of norms."""
    watch = GradientWatch(**options)
    net = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    said = []
    for norm in norms:
        watch.hold(optimizer, torch.tensor(float(norm)))
        said.append(bool(optimizer.found_inf))
        watch.settle([])
    return said, watch


def test_spikes_are_judged_by_the_moving_mean_and_deviation():
    rng = np.random.default_rng(0)
    norms = rng.lognormal(0, 0.3, 400)
    norms[50] = 1e4  # before there is anything to compare with
    norms[[150, 151, 300]] = [60.0, float("inf"), 60.0]
    norms[200] = 0.0
    said, _ = refusals(norms)
    count, mean, variance, expected = 0, 0.0, 0.0, []
    for g in norms:
        bad = not np.isfinite(g) or (count >= 100 and g > mean + 10 * max(variance**0.5, FLOOR * mean))
        expected.append(bad)
        if not bad:
            share, away = max(1 / (count + 1), 0.01), g - mean
            count, mean = count + 1, mean + share * away
            variance = (1 - share) * (variance + share * away * away)
    assert said == expected
    assert said[151] and not said[50] and not said[200]
    quiet = np.ones(300)
    quiet[[200, 250]] = [1.4, 1.6]  # of a run whose norms never vary: ten times 5 % above the mean is the limit
    assert [i for i, bad in enumerate(refusals(quiet)[0]) if bad] == [250]
    assert [i for i, bad in enumerate(refusals(quiet, sigmas=None)[0]) if bad] == []


def test_a_resumed_watch_decides_alike_and_a_plan_begins_anew():
    norms = [*np.random.default_rng(1).lognormal(0, 0.1, 150), 9.0, 1.0, 9.0]
    whole, _ = refusals(norms)
    _, first = refusals(norms[:120])
    second = GradientWatch()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizer = torch.optim.Adam(nn.Linear(1, 1).parameters(), fused=True)
    said = []
    for norm in norms[120:]:
        second.hold(optimizer, torch.tensor(float(norm)))
        said.append(bool(optimizer.found_inf))
        second.settle([])
    assert said == whole[120:] and said[-1] and float(second.refused) == 2
    second.forget()
    second.hold(optimizer, torch.tensor(9.0))
    assert not bool(optimizer.found_inf)


def test_buffers_go_back():
    norm = nn.BatchNorm1d(2)
    watch, optimizer = GradientWatch(), torch.optim.Adam(norm.parameters(), fused=True)
    buffers = moving_buffers(norm)
    watch.begin(buffers)
    for spoilt in (False, True, False):
        before = [b.clone() for b in buffers]
        x = torch.randn(4, 2)
        norm(x * float("nan") if spoilt else x).sum().backward()
        watch.hold(optimizer, torch.tensor(float("nan") if spoilt else 1.0))
        watch.settle(buffers)
        assert all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True)) == spoilt
    assert int(norm.num_batches_tracked) == 2 and all(b.isfinite().all() for b in buffers)
