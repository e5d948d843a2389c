import pytest
import torch
from safetensors.torch import load, save

from repalign.backbones.unet import UNet
from repalign.errors import UserError
from repalign.state import Cond, Tokens

# Published sizes: (arguments, parameters). Stable Diffusion 1.x prints 859.52 M, LDM-4's FFHQ model 274.06 M.
PUBLISHED = {
    "sd1": (
        {
            "dim": 320,
            "multipliers": (1, 2, 4, 4),
            "attention": (4, 2, 1),
            "heads": 8,
            "transformer_depth": 1,
            "context_dim": 768,
        },
        859_520_964,
    ),
    "ldm_f4": ({"dim": 224, "multipliers": (1, 2, 3, 4), "attention": (8, 4, 2), "head_dim": 32}, 274_056_163),
}
KINDS = {
    "plain": {"heads": 2},
    "head_dim": {"head_dim": 4},
    "class": {"heads": 2, "label": True, "scale_shift": True, "residual_resampling": True},
    "text": {"heads": 2, "transformer_depth": 2, "context_dim": 5},
    "hybrid": {"heads": 2, "transformer_depth": 1, "context_dim": 5, "concat_channels": 3},
    "no_context": {"heads": 2, "transformer_depth": 1},
    "variance": {"heads": 2, "variance_head": True},
}


def tiny(random: bool = True, **options) -> UNet:
    torch.manual_seed(0)
    sizes = {"dim": 8, "multipliers": (1, 2), "depth": 2, "attention": (2,), "groups": 4}
    net = UNet((4, 8, 8), 10, **{**sizes, **options})
    for parameter in net.parameters() if random else ():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(side: tuple[int, int] = (8, 8), batch: int = 3):
    generator = torch.Generator().manual_seed(1)
    cond = Cond(
        label=torch.arange(batch),
        text=Tokens(torch.randn(batch, 7, 5, generator=generator)),
        spatial=torch.randn(batch, 3, *side, generator=generator),
    )
    return torch.randn(batch, 4, *side, generator=generator), torch.arange(batch) * 300.0, cond


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    options, expected = PUBLISHED[name]
    channels = 4 if name == "sd1" else 3
    with torch.device("meta"):
        net = UNet((channels, 64, 64), 0, depth=2, **options)
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_every_parameter(name):
    net = tiny(**KINDS[name])
    out = net(*inputs())
    (out.pred.square().sum() + sum(h.square().sum() for h in out.heads.values())).backward()
    for key, parameter in net.named_parameters():
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.abs().sum() > 0, key


def test_fresh_network_predicts_zero_and_every_branch_begins_at_zero():
    net = tiny(random=False, **KINDS["hybrid"])
    assert net(*inputs()).pred.abs().max() == 0
    with torch.no_grad():
        block, x = net.down[3], torch.randn(2, 16, 4, 4)
        assert torch.equal(block(x, torch.randn(2, 32), torch.randn(2, 7, 5)), x)


@pytest.mark.parametrize("name", ["plain", "class", "hybrid"])
def test_taps_never_change_the_prediction_and_stop_early(name):
    net = tiny(**KINDS[name])
    assert list(net.tap_specs) == [*(f"down.{k}" for k in range(1, 5)), "mid", *(f"up.{k}" for k in range(1, 7))]
    with torch.no_grad():
        full = net(*inputs(), taps=list(net.tap_specs))
        assert torch.equal(full.pred, net(*inputs()).pred)
        calls = []
        net.out.register_forward_hook(lambda *_: calls.append(1))
        for tap, spec in net.tap_specs.items():
            early = net(*inputs(), taps=(tap,), only_taps=True)
            assert early.pred is None
            assert torch.equal(early.taps[tap].data, full.taps[tap].data)
            assert early.taps[tap].grid == spec.grid and early.taps[tap].data.shape[1:] == (
                spec.grid[0] * spec.grid[1],
                spec.dim,
            )
    assert not calls


def test_each_condition_is_read():
    for name, change in {
        "class": {"label": torch.tensor([10, 10, 10])},
        "text": {"text": Tokens(torch.zeros(3, 7, 5))},
        "hybrid": {"spatial": torch.zeros(3, 3, 8, 8)},
    }.items():
        net, (x, t, cond) = tiny(**KINDS[name]), inputs()
        with torch.no_grad():
            changed = net(x, t, Cond(**{**vars(cond), **change})).pred
            assert not torch.allclose(net(x, t, cond).pred, changed), name


def test_larger_and_oblong_states_pass():
    net = tiny(**KINDS["hybrid"])
    with torch.no_grad():
        out = net(*inputs((12, 20)), taps=("mid",))
    assert out.pred.shape == (3, 4, 12, 20) and out.taps["mid"].grid == (6, 10)


def test_far_from_the_border_a_larger_state_is_denoised_as_a_small_one():
    """Without attention the network is a filter: what it says of a place depends on the surroundings alone."""
    net = tiny(heads=2, attention=(), depth=1)
    for block in net.middle:
        block.attention = None
    for part in net.modules():
        if isinstance(part, torch.nn.GroupNorm):  # statistics are over the whole picture
            part.forward = lambda x: x
    x, t, cond = inputs((64, 64))
    with torch.no_grad():
        whole, part = net(x, t, cond).pred, net(x[..., 8:56, 8:56], t, cond).pred
    torch.testing.assert_close(part[..., 20:28, 20:28], whole[..., 28:36, 28:36], rtol=1e-3, atol=1e-4)


def test_save_and_load_round_trip():
    net, other = tiny(**KINDS["text"]), tiny(random=False, **KINDS["text"])
    other.load_state_dict(load(save(net.state_dict())))
    assert torch.equal(net(*inputs()).pred, other(*inputs()).pred)


def test_what_does_not_fit_says_so():
    with pytest.raises(UserError, match=r"backbone.attention: found \[4\]"):
        tiny(heads=2, attention=[4])
    with pytest.raises(UserError, match="expected one of heads and head_dim"):
        tiny(heads=2, head_dim=4)
    with pytest.raises(UserError, match="expected one of heads and head_dim"):
        tiny()
    with pytest.raises(UserError, match=r"backbone.transformer_depth: 0"):
        tiny(heads=2, context_dim=5)
    with pytest.raises(ValueError, match="3 groups do not divide 8"):
        tiny(heads=2, groups=3)
    with pytest.raises(UserError, match="one stream"):
        UNet({"latent": (4, 8, 8)}, 10, 8, (1, 2), 1, (1,), heads=2)
    x, t, cond = inputs((9, 8))
    with pytest.raises(UserError, match="9 x 8 cannot be halved 1 times"):
        tiny(heads=2)(x, t, cond)
    x, t, cond = inputs()
    with pytest.raises(UserError, match="attends to a context"):
        tiny(**KINDS["text"])(x, t, Cond(label=cond.label))
    with pytest.raises(UserError, match="expected a map of 3 x 8 x 8 beside the state, found none"):
        tiny(**KINDS["hybrid"])(x, t, Cond(text=cond.text))
    with pytest.raises(UserError, match="unknown tap of this backbone 'middle'"):
        tiny(heads=2)(x, t, cond, taps=("middle",))
