import hashlib

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from repalign.encoders.lite0 import Lite0Features
from repalign.errors import UserError
from repalign.metrics.features import to_uint8
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.inception import InceptionV3Features
from repalign.metrics.inception_file import FILE
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
from tasks.instantiate import build
from tasks.launch import compose
from tests.metrics.small import pictures


def test_bytes_of_dit_and_of_repa():
    p = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5 / 255, 0.999 / 255, 1.0, 1.2]).reshape(1, 1, 1, -1)
    assert to_uint8(p).flatten().tolist() == [0, 0, 0, 1, 1, 255, 255]
    assert to_uint8(p, "truncate").flatten().tolist() == [0, 0, 0, 0, 0, 255, 255]
    x = torch.rand(1000) * 2 - 1
    dit, repa = (127.5 * x + 128).clamp(0, 255).byte(), (255 * (x + 1) / 2).clamp(0, 255).byte()
    assert (to_uint8((x + 1) / 2) != dit).sum() <= 1 and (to_uint8((x + 1) / 2, "truncate") != repa).sum() <= 1
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 255).long(), every)
    with pytest.raises(UserError, match="unknown choice 'rond'. Did you mean 'round'"):
        to_uint8(p, "rond")


def test_lite0_scores():
    metrics = FeatureMetrics(Lite0Features(), {"fd_lite0": FrechetDistance()})
    real, noise = pictures(12, 1, size=32), torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    metrics.set_reference(Reference.measure(metrics._features, real.split(6), "x"))
    values = {}
    for name, images in (("same", real), ("noise", noise)):
        for batch in (1, 12):
            metrics.reset()
            for part in images.split(batch):
                metrics.update(part)
            values[name, batch] = metrics.compute()["fd_lite0"]
    assert values["same", 12] < 1e-3 * values["noise", 12]
    assert values["noise", 1] == pytest.approx(values["noise", 12], rel=1e-5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random Inception weights in the layout of the real file, small enough to be made here."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    made = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    load, torch.load = torch.load, lambda *a, **k: None
    take, torch.nn.Module.load_state_dict = torch.nn.Module.load_state_dict, lambda *a, **k: None
    try:
        made.__init__("inception-v3-compat", ["2048"], "unused")
    finally:
        torch.load, torch.nn.Module.load_state_dict = load, take
    torch.save(made.state_dict(), path)
    return path


def test_inception_reads_a_local_file_alone(weights, tmp_path, monkeypatch):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    network = InceptionV3Features(str(weights), sha256=digest[:8])
    features, logits, spatial, *_ = network(pictures(2, 1))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and spatial.shape == (2, 2023)
    assert torch.cat([features, logits, spatial], 1).isfinite().all() and not network.train().training
    assert digest[:16] in network.fingerprint
    with pytest.raises(UserError, match=rf"has SHA-256 {digest[:8]}..., expected 6726825d"):
        InceptionV3Features(str(weights))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no Inception weights named, and none at .*hub/checkpoints.* metric=lite0"):
        InceptionV3Features(None)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / FILE).symlink_to(weights)
    assert InceptionV3Features(None, sha256=digest[:8]).fingerprint == network.fingerprint
    with pytest.raises(UserError, match="metric.network.weights: no file"):
        InceptionV3Features(str(tmp_path / "none.pth"))


def test_inception_is_torch_fidelitys_network(weights):
    """The same weights, bytes and features; the spatial ones by hand, layer by layer, to the block they come from."""
    images = pictures(3, 1, size=40)
    own = InceptionV3Features(str(weights), sha256="")(images)
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    pooled, logits = theirs(to_uint8(images))
    assert torch.equal(own.pooled, pooled) and torch.equal(own.logits, logits) and pooled.std() > 0
    x = interpolate_bilinear_2d_like_tensorflow1x(to_uint8(images).float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    for name in "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2".split():
        x = getattr(theirs, name)(x)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c"):  # mixed, mixed_1, ..., mixed_5 of TensorFlow's graph
        x = getattr(theirs, f"Mixed_{name}")(x)
    early = theirs.Mixed_6d.branch1x1(x)
    assert early.shape == (3, 192, 17, 17)
    expected = early[:, :7].permute(0, 2, 3, 1).reshape(3, 17 * 17 * 7)
    assert torch.equal(own.spatial, expected) and expected.std() > 0


def test_all_scores_of_a_picture_come_from_one_call(weights, monkeypatch):
    """FID, sFID, IS, precision, recall, KID, density and coverage: one pass, one call of the network per portion."""
    monkeypatch.setenv("REPALIGN_INCEPTION", str(weights))
    words = ["experiment=sit_s", "task=evaluate", "task.draws=0", "metric=inception", "metric.chunk=8"]
    metrics = build(compose([*words, "+metric.network.sha256=''"]).metric, "metric")
    sizes = []
    metrics.network.network.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    metrics.set_reference(Reference.measure(metrics._features, [pictures(16, 1)], "real"))
    assert sizes == [8, 8]
    for part in pictures(20, 2, 0.1).split(6):
        metrics.update(part)
    values = metrics.compute()
    assert sizes == [8, 8] + [8, 8, 8]  # the last portion is filled up
    assert {"fid", "sfid", "is", "precision", "recall", "kid", "density", "coverage"} <= values.keys()
    assert values["fid"] > 0 and values["sfid"] > 0 and values["fid"] != values["sfid"]


def test_inception_file_with_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    file = tmp_path / "weights.pth"
    torch.save({"x": Harmful()}, file)
    with pytest.raises(UserError, match="cannot be read as weights"):
        InceptionV3Features(str(file), sha256="")
    assert not (tmp_path / "ran").exists()
