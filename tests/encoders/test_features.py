"""Feature spaces beside Inception's: an encoder's class token, CLIP's image embeddings."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from repalign.encoders.features import ClipFeatures, EncoderFeatures, resized
from repalign.errors import UserError
from repalign.metrics.discrepancy import GaussianDiscrepancy
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics, SeveralFeatures
from repalign.state import Tokens, TokenSpec
from tests.metrics.small import pictures


class Cells(torch.nn.Module):
    """Tokens are cells of the picture; the first may be a class token."""

    def __init__(self, prefix):
        super().__init__()
        self.spec = TokenSpec(3, (2, 2), prefix)
        self.fingerprint = "cells"

    def forward(self, images):
        assert images.shape[-2:] == (16, 16)
        cells = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(2).transpose(1, 2)
        return Tokens(torch.cat([2 * cells[:, :1]] * self.spec.prefix + [cells], 1), (2, 2), self.spec.prefix)


def test_the_class_token_or_the_mean():
    images = pictures(5, 1, size=16)
    (mean,), (token,) = (EncoderFeatures(Cells(prefix), 16)(images) for prefix in (0, 1))
    torch.testing.assert_close(mean, images.mean((2, 3)))
    torch.testing.assert_close(token, 2 * images[..., :8, :8].mean((2, 3)))
    assert EncoderFeatures(Cells(0), 16).fingerprint != EncoderFeatures(Cells(1), 16).fingerprint
    assert EncoderFeatures(Cells(0), 16)(pictures(2, 1, size=40))[0].shape == (2, 3)
    nameless = Cells(0)
    del nameless.fingerprint
    with pytest.raises(UserError, match="metric.network.encoder: Cells has no fingerprint"):
        EncoderFeatures(nameless)


def test_resampling_keeps_the_range_and_the_mean():
    images = (pictures(3, 1, size=40) > 0.5).float()
    small = resized(images, 16)
    assert small.shape == (3, 3, 16, 16) and small.min() >= 0 and small.max() <= 1
    assert float(small.mean()) == pytest.approx(float(images.mean()), abs=0.01)
    assert resized(images, 40) is images


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        projection_dim=8,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_from_a_folder(clip, tmp_path):
    network = ClipFeatures(str(clip))
    (found,) = network(pictures(4, 1, size=16))
    assert found.shape == (4, 8) and network.size == 16 and not network.train().training
    assert ClipFeatures(str(clip)).fingerprint == network.fingerprint
    with pytest.raises(UserError, match="metric.network.folder: no CLIP named; expected a folder with config.json"):
        ClipFeatures(None)
    with pytest.raises(UserError, match="metric.network.folder: .* holds no CLIP"):
        ClipFeatures(str(tmp_path / "none"))


def test_cmmd_and_a_frechet_distance_in_one_pass(clip):
    spaces = {
        "clip": FeatureMetrics(ClipFeatures(str(clip)), {"cmmd": GaussianDiscrepancy()}),
        "cells": FeatureMetrics(EncoderFeatures(Cells(1), 16), {"fd_cells": FrechetDistance()}),
    }
    real = pictures(30, 1, size=16)
    for space in spaces.values():
        space.set_reference(Reference.measure(space._features, [real], "real"))
    both = SeveralFeatures(spaces)
    values = []
    for made in (pictures(30, 2, size=16), pictures(30, 2, 0.3, size=16)):
        both.reset()
        both.update(made)
        values.append(both.compute())
    assert values[0]["cmmd"] < values[1]["cmmd"] and values[0]["fd_cells"] < values[1]["fd_cells"]
