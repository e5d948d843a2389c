import math

import pytest
import torch
from safetensors.torch import load, save

from repalign.backbones.clocks import ReversedClock
from repalign.backbones.ddt import DDT
from repalign.backbones.improved_dit import ImprovedDiT
from repalign.errors import UserError
from repalign.state import Cond

# Width, blocks, encoder blocks, heads, and millions of parameters of the paper's best ratios.
SIZES = {
    "b": (768, 12, 8, 12, 130.3),
    "l": (1024, 24, 20, 16, 457.6),
    "xl": (1152, 28, 22, 16, 674.6),
}


def randomised(net):
    torch.manual_seed(0)
    for parameter in net.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def tiny(latent=(4, 8, 8), **options) -> DDT:
    sizes = {"patch": 2, "dim": 32, "depth": 4, "encoder_depth": 3, "heads": 2, **options}
    return randomised(DDT(latent, num_classes=10, **sizes))


def baseline() -> ImprovedDiT:
    return randomised(ImprovedDiT((4, 8, 8), num_classes=10, patch=2, dim=32, depth=3, heads=2))


def inputs(batch: int = 3, latent=(4, 8, 8)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *latent, generator=generator)
    return x, torch.rand(batch, generator=generator), Cond(label=torch.arange(batch))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [32, 64])
def test_every_size_has_the_papers_parameters_and_runs_on_the_meta_device(size, side):
    dim, depth, encoder, heads, millions = SIZES[size]
    with torch.device("meta"):
        net = DDT((4, side, side), 1000, 2, dim, depth, encoder, heads)
        undivided = ImprovedDiT((4, side, side), 1000, 2, dim, depth, heads)
        cond = Cond(label=torch.zeros(1, dtype=torch.int64))
        out = net(torch.randn(1, 4, side, side), torch.rand(1), cond)
        assert undivided(torch.randn(1, 4, side, side), torch.rand(1), cond).pred.shape == (1, 4, side, side)
    count, own = (sum(p.numel() for p in n.parameters()) for n in (net, undivided))
    assert math.isclose(count / 1e6, millions, abs_tol=0.05)
    assert count - own == dim * (16 + 1)  # one patch embedder more
    assert out.pred.shape == (1, 4, side, side) and out.carry.shape == (1, side * side // 4, dim)
    assert f"encoder.{encoder}" in net.tap_specs and f"decoder.{depth - encoder}" in net.tap_specs


@pytest.mark.parametrize("net", [tiny(), tiny(depth=2, encoder_depth=1), baseline()])
def test_gradients_reach_every_parameter(net):
    net(*inputs()).pred.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("make", [DDT, ImprovedDiT])
def test_fresh_network_predicts_zero(make):
    sizes = {"encoder_depth": 2} if make is DDT else {}
    net = make((4, 8, 8), 10, patch=2, dim=32, depth=3, heads=2, **sizes)
    assert net(*inputs()).pred.abs().max() == 0
    assert net.io.patchify.bias.abs().max() == 0 and 0.01 < net.label_embed.weight.detach().std() < 0.03


def test_its_own_carry_gives_the_same_prediction_without_the_encoder():
    net = tiny()
    full = net(*inputs())
    ran = []
    for block in net.encoder:
        block.register_forward_hook(lambda *_: ran.append(1))
    again = net(*inputs(), carry=full.carry)
    assert not ran and torch.equal(again.pred, full.pred) and torch.equal(again.carry, full.carry)


def test_with_a_carry_time_and_label_are_not_read_but_the_latent_is():
    net, (x, t, cond) = tiny(), inputs()
    carry = net(x, t, cond).carry
    expected = net(x, t, cond, carry=carry).pred
    assert torch.equal(net(x, 1 - t, cond.map(lambda y: y + 1), carry=carry).pred, expected)
    assert not torch.allclose(net(x + 0.1, t, cond, carry=carry).pred, expected)


def test_the_label_reaches_the_decoder_through_the_carry():
    net, (x, t, cond) = tiny(), inputs()
    other = net(x, t, cond.map(lambda y: y + 1))
    assert not torch.allclose(other.pred, net(x, t, cond).pred)
    assert torch.equal(net(x, t, cond, carry=other.carry).pred, other.pred)


@pytest.mark.parametrize(
    ("net", "names", "after"),
    [(tiny(), ("encoder.1", "encoder.2"), "encoder.2"), (tiny(), ("encoder.2", "decoder.1"), None)],
)
def test_taps_never_change_the_prediction_and_stop_early(net, names, after):
    full = net(*inputs(), taps=names)
    assert torch.equal(full.pred, net(*inputs()).pred)
    ran = []
    (net.encoder[2] if after else net.final_norm).register_forward_hook(lambda *_: ran.append(1))
    early = net(*inputs(), taps=names, only_taps=True)
    assert early.pred is None and not ran
    for name in names:
        assert torch.equal(early.taps[name].data, full.taps[name].data)


def test_baseline_taps_stop_early():
    net = baseline()
    full = net(*inputs(), taps=("block.2",))
    early = net(*inputs(), taps=("block.2",), only_taps=True)
    assert early.pred is None and torch.equal(early.taps["block.2"].data, full.taps["block.2"].data)


def test_an_encoder_tap_cannot_be_had_with_a_carry():
    net = tiny()
    carry = net(*inputs()).carry
    assert net(*inputs(), taps=("decoder.1",), carry=carry).taps
    with pytest.raises(UserError, match=r"encoder\.2.*carry replaces the encoder"):
        net(*inputs(), taps=("encoder.2",), carry=carry)
    with pytest.raises(UserError, match=r"'encodr.2'. Did you mean 'encoder.2'"):
        net(*inputs(), taps=("encodr.2",))


def test_latents_need_not_be_square_and_weights_suit_every_size():
    small, wide = tiny(), tiny(latent=(4, 8, 12))
    wide.load_state_dict(load(save(small.state_dict())))
    assert wide(*inputs(latent=(4, 8, 12))).pred.shape == (3, 4, 8, 12)
    assert not any("rotary" in key for key in small.state_dict())


def test_reversed_clock_passes_the_carry():
    net, (x, t, cond) = tiny(), inputs()
    clock = ReversedClock(net)
    out = clock(x, t, cond)
    assert clock.uses_carry and torch.equal(out.carry, net(x, 1 - t, cond).carry)
    assert torch.equal(clock(x, t, cond, carry=out.carry).pred, out.pred)


@pytest.mark.parametrize("encoder_depth", [0, 4])
def test_both_halves_need_a_block(encoder_depth):
    with pytest.raises(UserError, match=r"backbone\.encoder_depth: expected 1 to depth - 1 = 3"):
        tiny(encoder_depth=encoder_depth)


def test_autocast_runs_without_a_warning():
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny()(*inputs())
    assert torch.isfinite(out.pred).all()


@pytest.mark.slow
def test_compiled_network_is_the_same():
    net = tiny()
    expected = net(*inputs(), taps=("encoder.2",))
    net.compile(fullgraph=True)
    out = net(*inputs(), taps=("encoder.2",))
    torch.testing.assert_close(out.pred, expected.pred, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.carry, expected.carry, rtol=1e-4, atol=1e-4)
