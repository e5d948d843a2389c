"""The real side of a score: the ADM suite's files, folders of pictures; measured once for one content."""

import numpy as np
import pytest
import torch
from PIL import Image

from repalign.errors import UserError
from repalign.metrics.features import Features
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.kid import KernelDistance
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
from tasks.evaluate import set_reference
from tests.metrics.small import SmallNetwork, pictures


class WithMap(SmallNetwork):
    """The small network with a spatial map."""

    def forward(self, images):
        pooled, logits = super().forward(images)
        return Features(pooled, logits, images[:, :, ::4, ::4].flatten(1))


def scored(**scores):
    return FeatureMetrics(WithMap(), scores or {"fid": FrechetDistance(), "sfid": FrechetDistance("spatial")})


def as_bytes(images):
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def in_bytes(images):
    return torch.from_numpy(as_bytes(images)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def real():
    return in_bytes(pictures(40, 1))


def values(metrics):
    metrics.reset()
    metrics.update(pictures(30, 2, 0.1))
    return metrics.compute()


def test_moments_of_adm_serve_fid_and_sfid(tmp_path, real):
    own = scored()
    measured = Reference.measure(own._features, [real], "x")
    file = tmp_path / "stats.npz"
    mu_s, sigma_s = measured.moments("spatial")
    np.savez(file, mu=measured.mean, sigma=measured.covariance, mu_s=mu_s, sigma_s=sigma_s)
    set_reference(own, file, None, tmp_path / "cache", 16)
    assert own.reference.holds == {"pooled", "spatial"} and not (tmp_path / "cache").exists()
    found = values(own)
    own.set_reference(measured)
    assert found == pytest.approx(values(own), rel=1e-9) and min(found.values()) > 0.001
    assert found["fid"] != found["sfid"]
    np.savez(file, mu=measured.mean, sigma=measured.covariance)
    with pytest.raises(UserError, match="holds pooled alone; sfid needs spatial.*~metric.scores.sfid"):
        set_reference(own, file, None, tmp_path / "cache", 16)
    with pytest.raises(UserError, match="holds pooled and spatial alone; kid needs features"):
        np.savez(file, mu=measured.mean, sigma=measured.covariance, mu_s=mu_s, sigma_s=sigma_s)
        set_reference(scored(kid=KernelDistance()), file, None, tmp_path / "cache", 16)


def as_batch(real, folder):
    """A sample batch of the ADM suite: arr_0, and arr_1 with the labels."""
    folder.mkdir(parents=True)
    np.savez(folder / "batch.npz", as_bytes(real), np.zeros(len(real), dtype=np.int64))
    return folder / "batch.npz"


def as_folder(real, folder):
    """One PNG per picture, in sub-folders as data sets have them."""
    for number, picture in enumerate(as_bytes(real)):
        file = folder / "png" / f"{number // 20}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    return folder / "png"


@pytest.mark.parametrize("written", [as_batch, as_folder])
def test_pictures_are_measured_once_for_one_content(tmp_path, real, written):
    metrics, cache = scored(), tmp_path / "cache"
    set_reference(metrics, written(real, tmp_path / "a"), None, cache, 16)
    seen, found = metrics.network.seen, values(metrics)
    assert seen == 64  # 40 pictures in portions of 64, filled up
    np.testing.assert_allclose(metrics.reference.mean, WithMap()(real)[0].double().mean(0), rtol=1e-6)
    assert metrics.reference.count == 40
    again = scored()
    set_reference(again, written(real, tmp_path / "elsewhere"), None, cache, 7)
    assert again.network.seen == 0 and values(again) == found  # the same content at another place: read, not measured
    other = scored()
    changed = real.clone()
    changed[7] = 1 - changed[7]
    set_reference(other, written(changed, tmp_path / "b"), None, cache, 16)
    assert other.network.seen == 64 and values(other) != found  # one picture is another one
    third = FeatureMetrics(WithMap(seed=1), {"fid": FrechetDistance()})
    set_reference(third, tmp_path / "a" / ("png" if written is as_folder else "batch.npz"), None, cache, 16)
    assert third.network.seen == 64 and len(list(cache.iterdir())) == 3  # another network


@pytest.mark.parametrize("batch", [1, 5, 8, 40])
def test_the_network_sees_full_portions_of_a_reference(tmp_path, real, batch):
    metrics = FeatureMetrics(WithMap(), {"fid": FrechetDistance()}, chunk=8)
    reference = metrics.prepare(lambda: real.split(batch), "x", tmp_path / f"{batch}")
    assert metrics.network.seen == 40
    whole = metrics.prepare(lambda: [real], "x", tmp_path / "whole")
    assert torch.equal(reference.mean, whole.mean) and torch.equal(reference.covariance, whole.covariance)


def test_a_batch_and_a_folder_of_the_same_pictures_agree(tmp_path, real):
    found = []
    for written in (as_batch, as_folder):
        metrics = scored()
        set_reference(metrics, written(real, tmp_path / written.__name__), None, tmp_path / "cache", 16)
        found.append(values(metrics))
    assert found[0] == pytest.approx(found[1], rel=1e-12)
