import math

import pytest
import torch
from safetensors.torch import load, save

from repalign.backbones.clocks import ReversedClock
from repalign.backbones.deepflow import DeepFlow, branch_lengths
from repalign.backbones.dit import DiT
from repalign.checkpoints.deepflow import deepflow_adapter
from repalign.errors import UserError
from repalign.nn.vera import VeRA
from repalign.objectives.deepflow import DeepSupervision
from repalign.paths.linear import LinearPath
from repalign.paths.time import Ladder, Uniform
from repalign.random import SampleRandom
from repalign.state import Cond

# (dim, depth, heads, branches): millions of parameters without projectors, of the network, a VeRA block, the time gap.
SIZES = {"b": ((768, 12, 12, 2), 166.2, 30.6, 2.8), "xl": ((1152, 24, 16, 3), 681.6, 45.4, None)}


def tiny(**options) -> DeepFlow:
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": 3, "heads": 4, "branches": 3, "acceleration_hidden": 24, **options}
    net = DeepFlow((4, 8, 8), num_classes=10, patch=2, **sizes)
    for parameter in net.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), Cond(label=torch.arange(batch))


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_official_ones(size):
    (dim, depth, heads, branches), whole, block, gap = SIZES[size]
    with torch.device("meta"):
        net = DeepFlow((4, 32, 32), 1000, 2, dim, depth, heads, branches, acceleration_hidden=2048)
        out = net(torch.randn(1, 4, 32, 32), torch.rand(1, branches), Cond(label=torch.zeros(1, dtype=torch.int64)))
    assert math.isclose(millions(net), whole, rel_tol=2e-3)
    assert math.isclose(millions(net.vera[0]), block, rel_tol=2e-3)
    assert gap is None or math.isclose(millions(net.gap_embed), gap, rel_tol=0.02)
    assert out.pred.shape == out.heads["velocity.1"].shape == out.heads["acceleration.1"].shape == (1, 4, 32, 32)
    assert net.tap_specs["vera.1"].grid == (16, 16)


def test_one_time_is_every_branchs():
    net = tiny()
    x, t, cond = inputs()
    one, ladder = net(x, t, cond), net(x, t[:, None].repeat(1, 3), cond)
    assert torch.equal(one.pred, ladder.pred)
    assert one.heads.keys() == {"velocity.1", "velocity.2", "acceleration.1", "acceleration.2"}
    for name, head in one.heads.items():
        assert torch.equal(head, ladder.heads[name])


def test_a_branchs_time_matters_from_its_own_vera_block_on():
    net = tiny()
    x, t, cond = inputs()
    before = torch.stack([t, t, t], 1)
    after = torch.stack([t, t, t + 0.01], 1)
    one, other = net(x, before, cond), net(x, after, cond)
    for name in ("velocity.1", "velocity.2", "acceleration.1", "acceleration.2"):
        assert torch.equal(one.heads[name], other.heads[name])
    assert not torch.allclose(one.pred, other.pred, rtol=0, atol=1e-6)


def test_vera_replaces_the_stream_and_bounds_its_scale():
    torch.manual_seed(0)
    free, bounded = VeRA(16, 2, 8), VeRA(16, 2, 8, scale_limit=5.0)
    bounded.load_state_dict(free.state_dict())
    h, x, gap = torch.randn(2, 4, 16), torch.randn(2, 4, 16), torch.randn(2, 32)
    torch.testing.assert_close(free(h, x, gap)[1], bounded(h, x, gap)[1])
    for block in (free, bounded):
        torch.nn.init.constant_(block.modulation.linear.bias, 50.0)
    assert not torch.allclose(free(h, x, gap)[1], bounded(h, x, gap)[1], atol=1e-3)
    # With attention switched off only the normalised input is left of it.
    torch.nn.init.zeros_(free.attention.out_proj.weight)
    torch.testing.assert_close(free(h, x, gap)[1], free.norm(x))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"scale_limit": 5.0}, {"branches": [1, 2]}])
def test_gradients_reach_every_parameter(options):
    net = tiny(**options)
    x, t, cond = inputs()
    out = net(x, torch.stack([t + 0.01 * k for k in range(net.branches)], 1), cond)
    (out.pred.square().sum() + sum(h.square().sum() for h in out.heads.values())).backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_fresh_network_predicts_zero_everywhere():
    out = DeepFlow((4, 8, 8), 10, 2, 32, 4, 4, 2, 24)(*inputs())
    assert out.pred.abs().max() == 0
    assert all(head.abs().max() == 0 for head in out.heads.values())


def test_taps_never_change_the_prediction_and_stop_early():
    net = tiny()
    calls = []
    net.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    full = net(*inputs(), taps=("block.1", "vera.2"))
    assert torch.equal(full.pred, net(*inputs()).pred)
    calls.clear()
    early = net(*inputs(), taps=("block.1", "vera.2"), only_taps=True)
    assert early.pred is None and not calls
    for name in ("block.1", "vera.2"):
        assert torch.equal(early.taps[name].data, full.taps[name].data)


def test_save_and_load_and_official_keys_round_trip():
    net, other = tiny(qk_norm=True), tiny(qk_norm=True)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    parts = {"backbone": net.state_dict(), "aligners.repa.head": {"layers.0.weight": torch.ones(2, 2)}}
    official = deepflow_adapter().to_official(parts)
    for key in (
        "dt_embedder.mlp.2.bias",
        "df_blocks.1.acc_mlp.6.weight",
        "df_blocks.0.acc_norm.adaLN_modulation.1.weight",
        "df_blocks.1.acc_norm.mlp.fc2.bias",
        "df_blocks.0.cross_attention.multihead_attn.in_proj_weight",
        "df_blocks.0.cross_attention.layer_norm.bias",
        "final_layer.0.linear.weight",
        "final_layer.1.adaLN_modulation.1.bias",
        "final_acc_layer.linear.bias",
        "blocks.2.attn.q_norm.weight",
        "projectors.0.0.weight",
    ):
        assert key in official
    back = deepflow_adapter().from_official(load(save(official)))
    assert back.keys() == parts.keys()
    other.load_state_dict(back["backbone"])
    assert torch.equal(net(*inputs()).pred, other(*inputs()).pred)


def test_branches_make_up_the_depth():
    assert branch_lengths(24, 3) == [8, 8, 8]
    assert branch_lengths(3, [1, 2]) == [1, 2]
    for depth, branches, message in ((24, 5, "divisor of backbone.depth"), (4, [1, 2], "do not make up")):
        with pytest.raises(UserError, match=message):
            branch_lengths(depth, branches)


def test_another_number_of_times_than_branches_says_so():
    x, _, cond = inputs()
    with pytest.raises(UserError, match="2 times a sample for a backbone of 3 branches"):
        tiny()(x, torch.rand(3, 2), cond)


@pytest.mark.parametrize(
    ("backbone", "rungs", "weights", "message"),
    [
        (DiT((4, 8, 8), 10, 2, 32, 2, 4), 2, [0.2, 1.0], r"the backbone has 1 \(DiT\)"),
        (ReversedClock(tiny()), 3, [0.2, 0.2, 1.0], "clock=native"),
        (tiny(), 3, [0.2, 1.0], "2 branches are weighted, the backbone has 3"),
        (tiny(), None, [0.2, 0.2, 1.0], "time_sampler=ladder"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(backbone, rungs, weights, message):
    times = Uniform() if rungs is None else Ladder(Uniform(), rungs, 0.01)
    objective = DeepSupervision(LinearPath(), times, weights, 1.0)
    x, _, cond = inputs()
    with pytest.raises(UserError, match=message):
        objective(backbone, x, cond, objective.draw(x, SampleRandom(0, range(3))))


@pytest.mark.slow
def test_compiled_network_is_the_same():
    net = tiny(depth=2, branches=2)
    x, t, cond = inputs()
    times = torch.stack([t, t + 0.01], 1)
    expected = net(x, times, cond, taps=("vera.1",))
    net.compile(fullgraph=True)
    out = net(x, times, cond, taps=("vera.1",))
    torch.testing.assert_close(out.pred, expected.pred, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.taps["vera.1"].data, expected.taps["vera.1"].data, rtol=1e-4, atol=1e-5)
