import hashlib

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from repalign.encoders.lite0 import Lite0Features
from repalign.errors import UserError
from repalign.metrics.features import to_uint8
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.inception import FILE, InceptionV3Features
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
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
    features, logits, spatial = network(pictures(2, 1))
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


def test_inception_file_with_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    file = tmp_path / "weights.pth"
    torch.save({"x": Harmful()}, file)
    with pytest.raises(UserError, match="cannot be read as weights"):
        InceptionV3Features(str(file), sha256="")
    assert not (tmp_path / "ran").exists()
