import pytest
import torch
from torch import nn

from repalign.encoders.cards import read_cards
from repalign.errors import UserError
from tests.encoders.small import small, stirred

ONE_OF_EACH = sorted({card.family: card.name for card in reversed(read_cards().values())}.values())


@pytest.mark.parametrize("card", ONE_OF_EACH)
def test_tokens_have_the_shape_of_the_spec_and_depend_on_the_image(card):
    encoder = stirred(card, 48)
    images = torch.rand(2, 3, 48, 48)
    tokens = encoder(images)
    assert tokens.data.shape == (2, 9, 16)
    assert (tokens.grid, tokens.prefix) == (encoder.spec.grid, encoder.spec.prefix) == ((3, 3), 0)
    assert tokens.data.dtype == torch.float32
    assert not torch.allclose(tokens.data[0], tokens.data[1])


def test_tokens_are_row_major():
    """Only the patch of the second row and third column changes most when its pixels do."""
    encoder = stirred("mae_b", 64, architecture={"depth": 1})
    images = torch.full((1, 3, 64, 64), 0.5)
    other = images.clone()
    other[:, :, 16:32, 32:48] = torch.rand(1, 3, 16, 16)
    change = (encoder(images).data - encoder(other).data).norm(dim=-1)[0]
    assert change.argmax() == 1 * 4 + 2


@pytest.mark.parametrize("card", ["dinov2_b", "dinov2_b_reg", "dinov3_s", "clip_l"])
def test_the_class_token_comes_first_when_asked_for(card):
    images = torch.rand(2, 3, 32, 32)
    with_class, without = stirred(card, class_token=True), stirred(card)
    tokens = with_class(images)
    assert (tokens.prefix, with_class.spec.prefix) == (1, 1)
    assert tokens.data.shape == (2, 5, 16)
    torch.testing.assert_close(tokens.patches.data, without(images).data)
    whole = with_class.network.forward_features(with_class.preprocess(images))  # timm's own order, class token first
    torch.testing.assert_close(tokens.data[:, 0], whole[:, 0])


@pytest.mark.parametrize("card", ["jepa_h", "siglip_b"])
def test_a_class_token_that_is_not_there_is_refused(card):
    with pytest.raises(UserError, match="encoders.main.class_token: .* has no class token"):
        small(card, class_token=True)


@pytest.mark.parametrize(
    ("card", "normed"), [("dinov2_b", True), ("mocov3_b", True), ("mae_b", False), ("clip_l", False)]
)
def test_the_final_norm_is_applied_where_repa_applies_it(card, normed):
    encoder = stirred(card)
    assert isinstance(encoder.network.norm, nn.Identity) != normed
    assert (encoder(torch.rand(3, 3, 32, 32)).data.std(-1) < 3).all() or not normed


def test_it_is_frozen_for_good():
    encoder = small("dinov1_b", architecture={"pos_drop_rate": 0.5})
    owner = nn.ModuleDict({"encoder": encoder}).train()
    assert owner.training and not any(part.training for part in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not encoder(images).data.requires_grad
    torch.testing.assert_close(encoder(images).data, encoder(images).data)


def test_precision_is_an_option_and_not_the_surrounding_autocast():
    images = torch.rand(2, 3, 32, 32)
    full, half = stirred("dinov2_s"), small("dinov2_s", precision="bfloat16")
    expected = full(images).data
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(full(images).data, expected, rtol=0, atol=0)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    out = half(images).data
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, small("dinov2_s")(images).data, rtol=0.1, atol=0.1)
    with pytest.raises(UserError, match="encoders.main.precision: unknown precision 'float16'"):
        small("dinov2_s", precision="float16")


def test_the_input_side_follows_the_image_or_the_option():
    assert small("dinov2_b", 256).preprocess.size == 224
    assert small("dinov2_b", 512).preprocess.size == 448
    assert small("mae_b", 256).preprocess.size == 256
    encoder = small("dinov2_b", 64, input_size=28)
    assert encoder.spec.grid == (2, 2)
    assert encoder(torch.rand(1, 3, 64, 64)).data.shape == (1, 4, 16)
    with pytest.raises(UserError, match="data.image_size: 40 is no multiple of 16"):
        small("dinov2_b", 40)
    with pytest.raises(UserError, match="encoders.main.input_size: 30 is no multiple of 14, the patch of dinov2_b"):
        small("dinov2_b", 64, input_size=30)


def test_random_weights_are_said_and_the_same_each_time(caplog):
    first = small("dinov2_b")
    torch.rand(3)
    state = torch.get_rng_state()
    second = small("dinov2_b")
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint == second.fingerprint
    assert "dinov2_b has random weights" in caplog.text


def test_the_fingerprint_changes_with_weights_input_and_taps():
    plain = small("dinov2_b")
    others = [
        stirred("dinov2_b"),
        small("dinov2_b", 64),
        small("dinov2_b", class_token=True),
        small("dinov2_b", precision="bfloat16"),
        small("dinov2_b", architecture={"num_heads": 4}),
        small("dinov1_b"),
    ]
    assert len({encoder.fingerprint for encoder in [plain, *others]}) == 7
    assert plain.fingerprint.startswith("dinov2_b-28-")
