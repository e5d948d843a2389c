"""What a training has cost: operations as PyTorch counts them, sums that a resumed run continues."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from callbacks.work import Work
from repalign.errors import UserError
from repalign.performance.operations import CountOperations


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.conv = nn.Linear(8, 8), nn.Conv2d(1, 2, 3)

    def forward(self, x):
        q = self.inner(x)
        x = scaled_dot_product_attention(q, q, x)
        return self.conv(x[:, :1]).square().mean()


def gradients(counter):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(3, 2, 6, 8)
    with counter:
        net(x).backward()
    return [p.grad for p in net.parameters()], counter


def test_counts_are_pytorchs_and_nothing_changes():
    ours, counter = gradients(CountOperations())
    with torch.enable_grad():
        alone, _ = gradients(torch.autograd.set_grad_enabled(True))
    _, theirs = gradients(FlopCounterMode(display=False))
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))
    assert counter.total == theirs.get_total_flops() > 0


class Module(nn.Module):
    device = torch.device("cpu")

    def __init__(self, phases=()):
        super().__init__()
        self.net, self.phases = nn.Linear(4, 4, bias=False), phases
        self.step = 0

    @property
    def active_phases(self):
        return self.phases[: 1 + (self.step >= 2)]


def steps(work, module, count, ranks=1, micro=1):
    for _ in range(count):
        for place in range(micro):
            work.begin(module)
            for _ in module.active_phases or (0,):
                module.net(torch.ones(5, 4))
            module.step += place == micro - 1
            work.end(module, ranks, place == micro - 1)


ONE = 2 * 5 * 4 * 4


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 1), (1, 3)])
def test_one_step_is_counted_for_all(ranks, micro):
    work = Work()
    steps(work, Module(), 3, ranks, micro)
    found = work.numbers(3)
    assert found["flops"] == 3 * ONE * ranks * micro and found["seconds"] > 0
    assert 0 < found["device_hours"] * 3600 < 10


def test_a_phase_that_joins_is_counted_anew_and_a_resumed_run_adds_up():
    module, whole = Module(("one", "two")), Work()
    steps(whole, module, 5)
    assert whole.numbers(5)["flops"] == (2 + 3 * 2) * ONE
    module, first = Module(("one", "two")), Work()
    steps(first, module, 3)
    state, later = first.state_dict(), Work("never")  # what is in the state is not counted again
    steps(first, module, 1)  # lost: killed before its checkpoint
    later.load_state_dict(state)
    module.step = 3
    steps(later, module, 2)
    assert later.numbers(5)["flops"] == whole.numbers(5)["flops"]
    assert later.numbers(5)["seconds"] >= state["seconds"] > 0


def test_pauses_are_left_out(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("callbacks.work._now", lambda: (clock.now, clock.now))
    work, module = Work(), Module()
    for seconds, pause in ((1.0, 10.0), (2.0, 0.0), (4.0, 0.0)):
        work.begin(module)
        clock.now += seconds
        work.end(module, 1, True)
        if pause:
            work.pause()
            clock.now += pause
    clock.now += 0.5  # waiting for data is work
    work.begin(module)
    work.end(module, 1, True)
    assert work.numbers(4)["seconds"] == 7.5


def test_what_is_not_known_is_not_told():
    work, module = Work(), Module()
    module.net.compile(backend="eager")
    steps(work, module, 2)
    assert "flops" not in work.numbers(2) and work.numbers(2)["seconds"] > 0
    work, module = Work(), Module()  # goes on from a checkpoint of an older version
    steps(work, module, 2)
    assert work.numbers(12) == {}
    with pytest.raises(UserError, match="callbacks.journal.flops: unknown choice 'alway'. Did you mean 'always'|flops"):
        Work("alway")
