import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from repalign.errors import UserError
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.inception_score import InceptionScore
from repalign.metrics.kid import KernelDistance
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
from tests.metrics.small import SmallNetwork, drawn_from, pictures


def suite(real, **scores):
    network = SmallNetwork()
    metrics = FeatureMetrics(
        network,
        scores
        or {
            "fd": FrechetDistance(),
            "kid": KernelDistance(subsets=8, subset_size=40),
            "is": InceptionScore(splits=4),
        },
    )
    metrics.set_reference(Reference.measure(metrics._features, [real], "real"))
    return metrics


def scored(metrics, images, batch):
    metrics.reset()
    for part in images.split(batch):
        metrics.update(part)
    return metrics.compute()


def test_frechet_distance_is_the_formula():
    real, drawn = pictures(90, 1), pictures(70, 2, shift=0.1)
    metrics = suite(real)
    features = [metrics._features(x)[0].double().numpy() for x in (real, drawn)]
    (m, c), (n, d) = [(f.mean(0), np.cov(f, rowvar=False)) for f in features]
    expected = np.sum((m - n) ** 2) + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert scored(metrics, drawn, 32)["fd"] == pytest.approx(expected, rel=1e-8)


def test_batch_size_does_not_matter():
    metrics, drawn = suite(pictures(90, 1)), pictures(64, 2, shift=0.05)
    whole = scored(metrics, drawn, 64)
    for batch in (1, 7):
        assert scored(metrics, drawn, batch) == pytest.approx(whole, rel=1e-6)


def test_equal_sets_are_at_distance_zero_and_sides_may_be_swapped():
    first, second = pictures(60, 1), pictures(60, 3, shift=0.15)
    assert 0 <= scored(suite(first), first, 20)["fd"] < 1e-6
    there, back = scored(suite(first), second, 20)["fd"], scored(suite(second), first, 20)["fd"]
    assert there == pytest.approx(back, rel=1e-8) and there > 0.01


def test_fewer_pictures_than_features_stay_finite():
    value = scored(suite(pictures(6, 1)), pictures(5, 2), 5)["fd"]
    assert np.isfinite(value) and value > 0


def test_kernel_distance_is_the_unbiased_estimate():
    real, drawn = pictures(30, 1), pictures(30, 2, shift=0.2)
    metrics = suite(real, kid=KernelDistance(subsets=2, subset_size=1000))
    x, y = (metrics._features(part)[0].double() for part in (real, drawn))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y)))
    expected = float(within - 2 * kernel(x, y).mean())
    found = scored(metrics, drawn, 30)
    assert found["kid"] == pytest.approx(expected, rel=1e-8) and found["kid_std"] == pytest.approx(0, abs=1e-10)


def test_inception_score_is_the_formula():
    # One picture repeated says nothing about classes.
    metrics = suite(pictures(10, 1), **{"is": InceptionScore(splits=2)})
    found = scored(metrics, pictures(1, 2).repeat(8, 1, 1, 1), 3)
    assert found["is"] == pytest.approx(1.0) and found["is_std"] == pytest.approx(0, abs=1e-9)
    score = InceptionScore(splits=2)
    logits = torch.randn(30, 5, generator=torch.Generator().manual_seed(3)) * 3
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    parts = logits.double()[order].softmax(1).split(15)
    expected = [float((p * (p / p.mean(0)).log()).sum(1).mean().exp()) for p in parts]
    assert score(drawn_from(logits=logits)) == pytest.approx((np.mean(expected), np.std(expected, ddof=1)), rel=1e-9)


def test_scores_grow_worse_with_the_shift():
    metrics = suite(pictures(80, 1))
    near, far = scored(metrics, pictures(80, 2, 0.05), 40), scored(metrics, pictures(80, 2, 0.4), 40)
    assert near["fd"] < far["fd"] and near["kid"] < far["kid"]


def test_global_randomness_is_left_alone():
    metrics = suite(pictures(50, 1))
    before = torch.random.get_rng_state()
    first = scored(metrics, pictures(50, 2), 50)
    middle = torch.random.get_rng_state()
    torch.manual_seed(5)
    second = scored(metrics, pictures(50, 2), 50)
    torch.random.set_rng_state(middle)
    assert first == second and torch.equal(before, middle)


def test_messages(tmp_path):
    metrics = suite(pictures(50, 1))
    with pytest.raises(UserError, match="num_samples: .* at least 2 .* found 0"):
        metrics.compute()
    lonely = FeatureMetrics(SmallNetwork(), {"fd": FrechetDistance()})
    lonely.update(pictures(2, 1))
    with pytest.raises(UserError, match="fd needs reference pictures; none were given"):
        lonely.compute()
    wide = FeatureMetrics(SmallNetwork(dim=9), {"fd": FrechetDistance()})
    wide.set_reference(metrics.reference)
    wide.update(pictures(2, 1))
    with pytest.raises(UserError, match="width 12, .* gives 9"):
        wide.compute()
    with pytest.raises(UserError, match="splits of at least 2, found 1"):
        InceptionScore(splits=1)
    with pytest.raises(UserError, match="4 splits .* found 3"):
        InceptionScore(splits=4)(drawn_from(logits=torch.zeros(3, 5)))
    blind = FeatureMetrics(lambda images: (images.mean((2, 3)),), {"is": InceptionScore()})
    blind.update(pictures(2, 1))
    with pytest.raises(UserError, match="gives no logits"):
        blind.compute()
