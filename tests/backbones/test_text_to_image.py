"""MM-DiT and Cross-DiT: sizes, gradients, taps, other picture sizes, masks, skipped blocks."""

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load, save

from repalign.backbones.clocks import ReversedClock
from repalign.backbones.cross_dit import CrossDiT
from repalign.backbones.mmdit import MMDiT
from repalign.errors import UserError
from repalign.nn.cross import PooledModulation, SharedModulation
from repalign.nn.positions import central, paper_rule, position_table
from repalign.state import Cond, Tokens

SHAPE, TEXT, POOLED = (4, 8, 8), 12, 10


def mmdit(**options) -> MMDiT:
    return MMDiT(SHAPE, TEXT, **{"pooled_dim": POOLED, "patch": 2, "depth": 3, "dim": 24, "heads": 3, **options})


def cross(**options) -> CrossDiT:
    return CrossDiT(SHAPE, TEXT, **{"pooled_dim": POOLED, "patch": 2, "depth": 3, "dim": 24, "heads": 3, **options})


NETWORKS = {
    "mmdit": mmdit,
    "mmdit_qk_norm": partial(mmdit, qk_norm=True),
    "mmdit_dual": partial(mmdit, qk_norm=True, dual_blocks=(1, 2)),
    "mmdit_dual_last": partial(mmdit, dual_blocks=(3,)),
    "mmdit_repa": partial(mmdit, pooled_dim=None, zero_init=False, time_scale=1.0),
    "cross": cross,
    "cross_qk_norm": partial(cross, qk_norm=True),
    "cross_variance": partial(cross, variance_head=True),
    "cross_size": partial(cross, modulation=partial(SharedModulation, size=True)),
    "cross_pooled": partial(cross, modulation=PooledModulation, text_mlp=False, text_mask=False, cross_norm=True),
}


def mixed(make):
    """A network whose zero layers do not hide mistakes."""
    torch.manual_seed(0)
    net = make()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(batch: int = 3, shape=SHAPE):
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    mask = torch.arange(5).expand(batch, 5) < torch.tensor([5, 3, 1])[:batch, None]
    size = torch.tensor([[64.0, 96.0, 2 / 3]]).expand(batch, 3)
    cond = Cond(text=Tokens(normal(batch, 5, TEXT)), pooled=normal(batch, POOLED), text_mask=mask, size=size)
    return normal(batch, *shape), torch.rand(batch, generator=generator), cond


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_parameter(name):
    net = mixed(NETWORKS[name])
    out = net(*inputs())
    (out.pred.square().sum() + sum(h.square().sum() for h in out.heads.values())).backward()
    for key, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
        # The last block's text is read and not written: its queries ask for nothing, but the official files hold them.
        unread = key == "blocks.2.text.attention.q_norm.weight"
        assert (parameter.grad.abs().sum() > 0) != unread, key


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_predicts_zero_unless_it_says_so(name):
    out = NETWORKS[name]()(*inputs()).pred
    assert (out.abs().max() == 0) == (name != "mmdit_repa")


@pytest.mark.parametrize("name", NETWORKS)
def test_taps_never_change_the_prediction_and_stop_early(name):
    net = mixed(NETWORKS[name])
    wanted = [tap for tap in net.tap_specs if not tap.startswith("block.3")]
    calls = []
    net.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    full = net(*inputs(), taps=wanted)
    assert torch.equal(full.pred, net(*inputs()).pred)
    calls.clear()
    early = net(*inputs(), taps=wanted, only_taps=True)
    assert early.pred is None and not calls
    for tap in wanted:
        assert torch.equal(early.taps[tap].data, full.taps[tap].data)
        assert early.taps[tap].grid == net.tap_specs[tap].grid
        assert early.taps[tap].data.shape[-1] == net.tap_specs[tap].dim
    assert full.taps["block.1"].data.shape == (3, 16, 24)


@pytest.mark.parametrize("name", NETWORKS)
def test_save_and_load_round_trip(name):
    net, other = mixed(NETWORKS[name]), NETWORKS[name]()
    other.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(net(*inputs()).pred, other(*inputs()).pred)


@pytest.mark.parametrize("name", ["mmdit", "cross"])
def test_pictures_of_other_sizes(name):
    net = mixed(partial(NETWORKS[name], table_side=8) if name == "mmdit" else NETWORKS[name])
    for shape in ((4, 4, 12), (4, 12, 6), (4, 2, 2)):
        out = net(*inputs(shape=shape), taps=("block.1",))
        assert out.pred.shape == (3, *shape)
        assert out.taps["block.1"].grid == (shape[1] // 2, shape[2] // 2)


def test_a_picture_larger_than_the_table_says_so():
    with pytest.raises(UserError, match=r"backbone.table_side: the table of 4 x 4 .* 6 x 4 patches; set it to 6"):
        mmdit()(*inputs(shape=(4, 12, 8)))


@pytest.mark.parametrize(("depth", "millions"), [(24, 2028), (38, 8057)])
def test_released_sizes(depth, millions):
    """2 and 8 billion parameters, with the text widths of SD3 and 16 latent channels."""
    with torch.device("meta"):
        net = MMDiT((16, 128, 128), 4096, 2048, patch=2, depth=depth, qk_norm=depth == 38, table_side=192)
    assert net.tap_specs["block.1"].dim == 64 * depth
    assert net.blocks[0].image.attention.heads == depth
    assert math.isclose(sum(p.numel() for p in net.parameters()) / 1e6, millions, rel_tol=0.01)


def test_pixart_has_its_size():
    """0.6 billion parameters (arXiv:2310.00426, Table 1: 0.6B)."""
    with torch.device("meta"):
        net = CrossDiT((4, 64, 64), 4096, None, patch=2, dim=1152, depth=28, heads=16, variance_head=True)
    assert math.isclose(sum(p.numel() for p in net.parameters()) / 1e6, 610.9, rel_tol=0.005)


def test_hidden_text_tokens_are_not_seen_and_none_left_is_no_nan():
    net = mixed(cross)
    x, t, cond = inputs()
    moved = cond.text.data.clone()
    moved[1, 3:] += 1.0
    other = Cond(text=Tokens(moved), pooled=cond.pooled, text_mask=cond.text_mask)
    torch.testing.assert_close(net(x, t, cond).pred, net(x, t, other).pred)
    assert not torch.allclose(net(x, t, Cond(text=Tokens(moved))).pred[1], net(x, t, Cond(text=cond.text)).pred[1])
    nothing = Cond(text=cond.text, text_mask=torch.zeros_like(cond.text_mask))
    assert torch.isfinite(net(x, t, nothing).pred).all()


def test_a_fresh_cross_dit_ignores_the_text():
    net = cross()
    torch.nn.init.normal_(net.linear.weight)
    x, t, cond = inputs()
    assert torch.equal(net(x, t, cond).pred, net(x, t, Cond(text=Tokens(cond.text.data + 1), pooled=cond.pooled)).pred)


def test_skipped_blocks_are_passed_over():
    net = mixed(mmdit)
    x, t, cond = inputs()
    skipped = Cond(text=cond.text, pooled=cond.pooled, skip=(2,))
    out = net(x, t, skipped, taps=("block.1", "block.2", "block.1/text", "block.2/text"))
    assert torch.equal(out.taps["block.1"].data, out.taps["block.2"].data)
    assert torch.equal(out.taps["block.1/text"].data, out.taps["block.2/text"].data)
    assert not torch.equal(out.pred, net(x, t, cond).pred)
    assert ReversedClock(net).skips_blocks
    with pytest.raises(UserError, match=r"guidance.layers: no block 4; valid: 1 to 3"):
        net(x, t, Cond(text=cond.text, pooled=cond.pooled, skip=(4,)))


@pytest.mark.parametrize("blocks", [(0,), (4,)])
def test_dual_blocks_exist(blocks):
    with pytest.raises(UserError, match=r"backbone.dual_blocks: expected numbers from 1 to depth=3"):
        mmdit(dual_blocks=blocks)


def test_the_middle_of_a_table():
    table = position_table(8, 6)
    assert central(table, (6, 6)) is table
    rows = central(table, (2, 3)).reshape(2, 3, 8)
    # The first half of a position's channels is the column's, the second the row's.
    torch.testing.assert_close(rows[0, 0, 4:], position_table(8, 1, origin=-2)[0, 0, 4:])
    torch.testing.assert_close(rows[0, 0, :4], position_table(8, 1, origin=-1)[0, 0, :4])


def test_the_papers_positions_keep_the_square_where_it_was():
    """Of 512 pixels: s = 32 patches in the middle cover the positions 0 .. 16 of 256 pixels."""
    origin, spacing = paper_rule(40, 512)
    assert (4 - origin) * spacing == 0
    assert (36 - origin) * spacing == 16


def test_conditions_travel_together():
    _, _, cond = inputs()
    both = cond.concatenate(cond.where(torch.tensor([True, False, False]), cond.map(torch.zeros_like)))
    assert both.text_mask.shape == (6, 5) and both.size.shape == (6, 3)
    assert not both.text_mask[3].any() and torch.equal(both.text_mask[4], cond.text_mask[1])
    assert Cond(text=cond.text, skip=(1,)).map(lambda x: x[:1]).skip == (1,)
