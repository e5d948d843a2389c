"""One backbone, other token ios: states of several streams."""

import math

import pytest
import torch
from safetensors.torch import load, save

from repalign.backbones.dit import DiT
from repalign.errors import UserError
from repalign.nn.stream_io import ChannelIO, PatchAndClassIO, SeparateIO
from repalign.nn.token_io import PatchIO
from repalign.state import Cond, Streams

CLASS = {"latent": (4, 8, 8), "class_token": (24,)}
MAPS = {"latent": (4, 8, 8), "features": (3, 8, 8)}
IOS = {"class": (PatchAndClassIO, CLASS, 1), "channels": (ChannelIO, MAPS, 0), "separate": (SeparateIO, MAPS, 16)}


def tiny(token_io, shape, **options) -> DiT:
    torch.manual_seed(0)
    net = DiT(shape, num_classes=10, patch=2, dim=32, depth=3, heads=4, token_io=token_io, **options)
    for parameter in net.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(shape, batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = Streams({name: torch.randn(batch, *own, generator=generator) for name, own in shape.items()})
    return x, torch.rand(batch, generator=generator), Cond(label=torch.arange(batch))


@pytest.mark.parametrize("name", IOS)
def test_prediction_has_the_streams_of_the_state_and_taps_their_prefix(name):
    token_io, shape, prefix = IOS[name]
    net = tiny(token_io, shape)
    out = net(*inputs(shape), taps=("block.2",))
    assert {k: tuple(v.shape[1:]) for k, v in out.pred.items()} == shape and not out.heads
    spec = net.tap_specs["block.2"]
    assert (spec.grid, spec.prefix) == ((4, 4), prefix)
    assert out.taps["block.2"].data.shape == (3, prefix + 16, 32) == (3, *net.pos_embed.shape[1:])
    assert out.taps["block.2"].patches.data.shape == (3, 16, 32)


@pytest.mark.parametrize("name", IOS)
def test_gradients_reach_every_parameter(name):
    token_io, shape, _ = IOS[name]
    net = tiny(token_io, shape)
    sum(value.square().sum() for value in net(*inputs(shape)).pred.values()).backward()
    for key, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", IOS)
def test_every_stream_is_read_by_every_stream(name):
    token_io, shape, _ = IOS[name]
    net = tiny(token_io, shape)
    x, t, cond = inputs(shape)
    before = net(x, t, cond).pred
    for changed in shape:
        after = net(Streams({**x, changed: x[changed] + 1}), t, cond).pred
        assert all(not torch.allclose(after[k], before[k]) for k in shape)


@pytest.mark.parametrize("name", IOS)
def test_fresh_network_predicts_zero_and_survives_a_file(name):
    token_io, shape, _ = IOS[name]
    fresh = DiT(shape, 10, 2, 32, 2, 4, token_io=token_io)
    assert all(value.abs().max() == 0 for value in fresh(*inputs(shape)).pred.values())
    net, other = tiny(token_io, shape), tiny(token_io, shape)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(load(save(net.state_dict())))
    for key, value in net(*inputs(shape)).pred.items():
        assert torch.equal(value, other(*inputs(shape)).pred[key])


def test_joined_channels_are_the_sum_of_two_embeddings():
    joined, first, second = ChannelIO(MAPS, 2, 32), PatchIO((4, 8, 8), 2, 32), PatchIO((3, 8, 8), 2, 32)
    weight = joined.patches.patchify.weight.detach()
    for part, own in ((first, weight[:, :4]), (second, weight[:, 4:])):
        part.patchify.load_state_dict({"weight": own, "bias": joined.patches.patchify.bias / 2})
    x = inputs(MAPS)[0]
    torch.testing.assert_close(joined.embed(x), first.embed(x["latent"]) + second.embed(x["features"]))


def test_the_class_token_stands_at_zero_and_patches_where_they_always_are():
    net, plain = tiny(PatchAndClassIO, CLASS), tiny(PatchIO, (4, 8, 8))
    assert net.pos_embed[:, 0].abs().max() == 0 and torch.equal(net.pos_embed[:, 1:], plain.pos_embed)


@pytest.mark.parametrize("name", ["channels", "separate"])
def test_a_variance_head_is_split_into_the_streams(name):
    token_io, shape, _ = IOS[name]
    out = tiny(token_io, shape, variance_head=True)(*inputs(shape))
    assert {k: tuple(v.shape[1:]) for k, v in out.heads["variance"].items()} == shape


# Millions of parameters computed from the official code: REG without its projector, ReDi.
@pytest.mark.parametrize(
    ("token_io", "further", "size", "millions"),
    [
        (PatchAndClassIO, {"class_token": (768,)}, (768, 12, 12), 139.0 - 7.3),
        (PatchAndClassIO, {"class_token": (768,)}, (1152, 28, 16), 685.0 - 8.1),
        (ChannelIO, {"features": (8, 32, 32)}, (768, 12, 12), 130.5),
        (ChannelIO, {"features": (8, 32, 32)}, (1152, 28, 16), 675.2),
    ],
)
def test_parameter_counts_match_the_official_networks(token_io, further, size, millions):
    dim, depth, heads = size
    with torch.device("meta"):
        net = DiT({"latent": (4, 32, 32), **further}, 1000, 2, dim, depth, heads, token_io=token_io)
    counted = sum(p.numel() for p in net.parameters()) + net.pos_embed.numel()
    assert math.isclose(counted / 1e6, millions, abs_tol=0.15)


@pytest.mark.parametrize(
    ("token_io", "shape", "words"),
    [
        (PatchIO, CLASS, "token_io: patches take one stream, found latent, class_token"),
        (PatchAndClassIO, MAPS, "found latent of \\[4, 8, 8\\], features of \\[3, 8, 8\\]; set streams=class_token"),
        (PatchAndClassIO, (4, 8, 8), "found one stream of \\[4, 8, 8\\]; set streams=class_token"),
        (ChannelIO, CLASS, "class_token of \\[24\\]; set streams=pca_features"),
        (SeparateIO, {"latent": (4, 8, 8), "features": (3, 4, 4)}, "one height and width"),
    ],
)
def test_a_state_that_does_not_suit_the_token_io_says_which(token_io, shape, words):
    with pytest.raises(UserError, match=words):
        DiT(shape, 10, 2, 32, 1, 4, token_io=token_io)


def test_a_class_token_has_no_variance():
    with pytest.raises(UserError, match="backbone.variance_head"):
        DiT(CLASS, 10, 2, 32, 1, 4, variance_head=True, token_io=PatchAndClassIO)


@pytest.mark.slow
def test_compiled_network_is_the_same():
    token_io, shape, _ = IOS["class"]
    net = tiny(token_io, shape)
    expected = net(*inputs(shape)).pred
    net.compile()
    for key, value in net(*inputs(shape)).pred.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
