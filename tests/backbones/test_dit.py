import math
from itertools import product

import pytest
import torch
from safetensors.torch import load, save

from repalign.backbones.clocks import ReversedClock, StepClock, unwrapped
from repalign.backbones.dit import DiT
from repalign.errors import UserError
from repalign.state import Cond

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
# Millions of parameters printed by the DiT paper (Table 1 of the patch-2 models) and computed for REPA (its note).
PAPER_MILLIONS = {"s": 33, "b": 130, "l": 458, "xl": 675}


def tiny(**options) -> DiT:
    torch.manual_seed(0)
    net = DiT((4, 8, 8), num_classes=10, patch=2, dim=32, depth=3, heads=4, **options)
    for parameter in net.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), Cond(label=torch.arange(batch))


@pytest.mark.parametrize(("size", "patch", "image"), list(product(SIZES, (1, 2, 4, 8), (256, 512))))
def test_every_size_runs_on_the_meta_device(size, patch, image):
    dim, depth, heads = SIZES[size]
    side = image // 8
    with torch.device("meta"):
        net = DiT((4, side, side), 1000, patch, dim, depth, heads, variance_head=True)
        out = net(torch.randn(1, 4, side, side), torch.rand(1), Cond(label=torch.zeros(1, dtype=torch.int64)))
    assert out.pred.shape == out.heads["variance"].shape == (1, 4, side, side)
    assert net.tap_specs[f"block.{depth}"].grid == (side // patch, side // patch)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_match_the_paper(size):
    dim, depth, heads = SIZES[size]
    with torch.device("meta"):
        net = DiT((4, 32, 32), 1000, 2, dim, depth, heads, variance_head=True)
    assert math.isclose(sum(p.numel() for p in net.parameters()) / 1e6, PAPER_MILLIONS[size], rel_tol=0.01)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"variance_head": True}, {"mlp_ratio": 2.0}])
def test_gradients_reach_every_parameter(options):
    net = tiny(**options)
    out = net(*inputs())
    (out.pred.square().sum() + sum(h.square().sum() for h in out.heads.values())).backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_fresh_network_predicts_zero():
    net = DiT((4, 8, 8), 10, 2, 32, 2, 4)
    assert net(*inputs()).pred.abs().max() == 0


def test_taps_never_change_the_prediction_and_stop_early():
    net = tiny()
    calls = []
    net.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    full = net(*inputs(), taps=("block.1", "block.2"))
    assert torch.equal(full.pred, net(*inputs()).pred)
    calls.clear()
    early = net(*inputs(), taps=("block.1", "block.2"), only_taps=True)
    assert early.pred is None
    assert not calls
    for name in ("block.1", "block.2"):
        assert torch.equal(early.taps[name].data, full.taps[name].data)


def test_unknown_tap_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown tap of this backbone 'blok.2'. Did you mean 'block.2'\?"):
        tiny()(*inputs(), taps=("blok.2",))


def test_save_and_load_round_trip():
    net, other = tiny(), tiny()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(net(*inputs()).pred, other(*inputs()).pred)


def test_reversing_twice_is_the_identity():
    net = tiny()
    x, _, cond = inputs()
    t = torch.tensor([1, 513, 1000]) / 1024  # exact in 1 - t
    twice = ReversedClock(ReversedClock(net))
    assert torch.equal(twice(x, t, cond).pred, net(x, t, cond).pred)
    assert torch.equal(ReversedClock(net)(x, t, cond).pred, -net(x, 1 - t, cond).pred)
    assert torch.equal(ReversedClock(net, flip_sign=False)(x, t, cond).pred, net(x, 1 - t, cond).pred)
    assert unwrapped(ReversedClock(net)) is net


def test_step_clock_feeds_whole_steps():
    net = tiny()
    x, _, cond = inputs()
    steps = torch.tensor([0, 499, 999])
    house = (steps + 1) / 1000
    assert torch.equal(StepClock(net, 1000)(x, house, cond).pred, net(x, steps.float(), cond).pred)


@pytest.mark.parametrize(("patch", "heads", "message"), [(3, 4, "patch"), (2, 5, "heads")])
def test_sizes_that_do_not_fit_say_so(patch, heads, message):
    with pytest.raises(ValueError, match=message):
        DiT((4, 8, 8), 10, patch, 32, 1, heads)


@pytest.mark.slow
def test_compiled_network_is_the_same():
    net = tiny()
    expected = net(*inputs(), taps=("block.2",))
    net.compile(fullgraph=True)
    out = net(*inputs(), taps=("block.2",))
    torch.testing.assert_close(out.pred, expected.pred, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.taps["block.2"].data, expected.taps["block.2"].data, rtol=1e-4, atol=1e-5)
