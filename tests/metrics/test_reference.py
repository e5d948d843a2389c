import numpy as np
import pytest
import torch

from repalign.errors import UserError
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.kid import KernelDistance
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
from tests.metrics.small import SmallNetwork, pictures


def test_moments_are_numpys_and_batches_do_not_matter():
    network, real = SmallNetwork(), pictures(40, 1)
    rows = network(real)[0].double().numpy()
    for batch in (1, 7, 40):
        found = Reference.measure(network, real.split(batch), "x", keep=11)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-6)
        np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-5, atol=1e-7)
        assert found.count == 40
        if batch == 1:
            kept = found.features
        torch.testing.assert_close(found.features, kept, rtol=1e-5, atol=1e-6)
    assert kept.shape == (11, 12)


def test_statistics_are_measured_once_and_read_back(tmp_path):
    calls = []

    def batches():
        calls.append(1)
        return pictures(30, 1).split(10)

    values = []
    for _ in range(2):
        metrics = FeatureMetrics(SmallNetwork(), {"fd": FrechetDistance(), "kid": KernelDistance(4, 10)})
        metrics.prepare(batches, "pictures-1", tmp_path)
        metrics.update(pictures(20, 2))
        values.append(metrics.compute())
    assert len(calls) == 1 and values[0] == values[1]
    FeatureMetrics(SmallNetwork(seed=1), {}).prepare(batches, "pictures-1", tmp_path)  # another network
    FeatureMetrics(SmallNetwork(), {}).prepare(batches, "pictures-2", tmp_path)  # other pictures
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 3


def test_moments_file_of_the_adm_evaluator(tmp_path):
    network, real, drawn = SmallNetwork(), pictures(60, 1), pictures(50, 2, 0.1)
    own = Reference.measure(network, [real], "x")
    np.savez(tmp_path / "stats.npz", mu=own.mean.numpy(), sigma=own.covariance.numpy())
    values = []
    for reference in (own, Reference.load(tmp_path / "stats.npz")):
        metrics = FeatureMetrics(network, {"fd": FrechetDistance()})
        metrics.set_reference(reference)
        metrics.update(drawn)
        values.append(metrics.compute()["fd"])
    assert values[0] == pytest.approx(values[1], rel=1e-8)
    with pytest.raises(UserError, match="'stats.npz' holds pooled alone; kid needs features.*~metric.scores.kid"):
        FeatureMetrics(network, {"kid": KernelDistance()}).set_reference(Reference.load(tmp_path / "stats.npz"))


def test_messages(tmp_path):
    with pytest.raises(UserError, match="reference: no file"):
        Reference.load(tmp_path / "none.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(UserError, match="torn.safetensors' cannot be read"):
        Reference.load(tmp_path / "torn.safetensors")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(UserError, match="expected .* or .npz with mu, sigma"):
        Reference.load(tmp_path / "other.npz")
    with pytest.raises(UserError, match="found 1 pictures"):
        Reference.measure(SmallNetwork(), [pictures(1, 1)], "x")
