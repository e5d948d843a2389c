import math

import pytest
import torch
from safetensors.torch import load, save

from repalign.backbones.sit_down import SiTDown
from repalign.errors import UserError
from repalign.state import Cond

SIZES = {
    "s": (384, (3, 6, 3), 6),
    "b": (768, (3, 6, 3), 12),
    "l": (1024, (6, 12, 6), 16),
    "xl": (1152, (7, 14, 7), 16),
}


def tiny(**options) -> SiTDown:
    torch.manual_seed(0)
    net = SiTDown((4, 8, 8), num_classes=10, patch=2, dim=16, depth=(1, 2, 1), heads=2, **options)
    for parameter in net.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), Cond(label=torch.arange(batch))


@pytest.mark.parametrize("image", [256, 512])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_runs_on_the_meta_device(size, image):
    dim, depth, heads = SIZES[size]
    side = image // 8
    with torch.device("meta"):
        net = SiTDown((4, side, side), 1000, 2, dim, depth, heads, variance_head=True)
        out = net(torch.randn(1, 4, side, side), torch.rand(1), Cond(label=torch.zeros(1, dtype=torch.int64)))
    assert out.pred.shape == out.heads["variance"].shape == (1, 4, side, side)
    assert net.tap_specs["mid"].grid == (side // 4, side // 4)
    blocks = [name for name in net.tap_specs if "." in name]
    assert len(blocks) == sum(depth)


@pytest.mark.parametrize("options", [{}, {"mid_mult": 2}, {"qk_norm": True}, {"variance_head": True}])
def test_gradients_reach_every_parameter(options):
    net = tiny(**options)
    out = net(*inputs())
    (out.pred.square().sum() + sum(h.square().sum() for h in out.heads.values())).backward()
    for name, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_fresh_network_predicts_zero():
    net = SiTDown((4, 8, 8), 10, 2, 16, (1, 1, 1), 2)
    assert net(*inputs()).pred.abs().max() == 0


def test_taps_never_change_the_prediction_and_stop_early():
    net = tiny()
    calls = []
    net.fuse.register_forward_hook(lambda *_: calls.append(1))
    full = net(*inputs(), taps=list(net.tap_specs))
    assert torch.equal(full.pred, net(*inputs()).pred)
    assert torch.equal(full.taps["mid"].data, full.taps["middle.2"].data)
    calls.clear()
    for name, spec in net.tap_specs.items():
        early = net(*inputs(), taps=(name,), only_taps=True)
        assert early.pred is None
        assert torch.equal(early.taps[name].data, full.taps[name].data)
        assert early.taps[name].grid == spec.grid and early.taps[name].data.shape[-1] == spec.dim
    assert len(calls) == 1  # for the decoder alone


def test_joining_and_splitting_undo_each_other():
    """With identities for their layers: the order of the joined channels is that of pixel_unshuffle."""
    net = tiny(mid_mult=4)
    x = torch.randn(2, 16, 16)
    for layer in (net.down.proj, net.up.proj):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    image = x.transpose(1, 2).reshape(2, 16, 4, 4)
    expected = torch.nn.functional.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(net.down(x), expected)
    torch.testing.assert_close(net.up(net.down(x)), x)


def test_save_and_load_round_trip():
    net, other = tiny(), tiny()
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(net(*inputs()).pred, other(*inputs()).pred)


def test_parameters_are_those_of_sit_and_of_the_seams():
    """675 million of SiT-XL/2, 16 million of the second embeddings, the joining, splitting and fusing layers."""
    dim, depth, heads = SIZES["xl"]
    with torch.device("meta"):
        net = SiTDown((4, 32, 32), 1000, 2, dim, depth, heads)
    assert math.isclose(sum(p.numel() for p in net.parameters()) / 1e6, 675 + 16, rel_tol=0.01)


def test_sizes_that_do_not_fit_say_so():
    with pytest.raises(ValueError, match="cannot be halved"):
        SiTDown((4, 6, 6), 10, 2, 16, (1, 1, 1), 2)
    with pytest.raises(UserError, match=r"backbone.depth: expected three numbers"):
        SiTDown((4, 8, 8), 10, 2, 16, (1, 1), 2)
