"""Precision, recall, density, coverage and CMMD against their definitions, and the engines of other packages."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from repalign.errors import UserError
from repalign.metrics.discrepancy import GaussianDiscrepancy
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.inception_score import InceptionScore
from repalign.metrics.intervals import half_width
from repalign.metrics.kid import KernelDistance
from repalign.metrics.manifold import Coverage, Density, Precision, Recall
from repalign.metrics.moments import Moments, distance
from repalign.metrics.reference import Reference
from tests.metrics.small import drawn_from


class Given(torch.nn.Module):
    """Stands where torchmetrics expects a network."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def rows(count, seed, shift=0.0, dim=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) @ torch.diag(torch.linspace(0.3, 2, dim)) + shift


def reference(features):
    moments = Moments.of(features)
    return Reference(moments.mean, moments.covariance, len(features), features, "given")


REAL, MADE = rows(130, 1), rows(150, 2, 0.4)


def balls(x, k):
    """Distance of every row to its k-th nearest other row, the slow way."""
    return torch.stack([(x - row).norm(dim=1).sort().values[k] for row in x.double()])


def test_balls_are_the_definitions():
    x, y = REAL.double(), MADE.double()
    apart = torch.stack([(x - row).norm(dim=1) for row in y])  # [made, real]
    expected = {
        Precision(3): (apart <= balls(x, 3)).any(1).double().mean(),
        Recall(3): (apart <= balls(y, 3)[:, None]).any(0).double().mean(),
        Density(5): (apart < balls(x, 5)).sum(1).double().mean() / 5,
        Coverage(5): (apart.amin(0) < balls(x, 5)).double().mean(),
    }
    for score, value in expected.items():
        found, spread = score(drawn_from(MADE), reference(REAL))
        assert found == pytest.approx(float(value), abs=1e-12) and spread is None
        assert 0.1 < found  # the sets overlap: none of the numbers is trivial


def test_swapping_the_sides_swaps_precision_and_recall():
    there = [score(drawn_from(MADE), reference(REAL))[0] for score in (Precision(), Recall())]
    back = [score(drawn_from(REAL), reference(MADE))[0] for score in (Precision(), Recall())]
    assert there == back[::-1] and there[0] != there[1]


def test_equal_sets_are_perfect():
    for score in (Precision(), Recall(), Coverage()):
        assert score(drawn_from(REAL), reference(REAL))[0] == 1
    assert GaussianDiscrepancy()(drawn_from(REAL), reference(REAL))[0] == pytest.approx(0, abs=1e-9)


def test_gaussian_discrepancy_is_the_formula():
    x, y = (torch.nn.functional.normalize(z.double(), dim=1) for z in (REAL, MADE))

    def mean(a, b):
        return torch.exp(-torch.cdist(a, b).square() / (2 * 10.0**2)).mean()

    found, _ = GaussianDiscrepancy(10.0, 1000.0)(drawn_from(MADE), reference(REAL))
    assert found == pytest.approx(float(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))), rel=1e-9) and found > 0


def test_frechet_distance_agrees_with_scipy_torch_fidelity_and_torchmetrics():
    real, made = Moments.of(REAL), Moments.of(MADE)
    found, _ = FrechetDistance()(drawn_from(MADE), reference(REAL))
    m, c, n, d = (x.numpy() for x in (real.mean, real.covariance, made.mean, made.covariance))
    assert found == pytest.approx(np.sum((m - n) ** 2) + np.trace(c + d - 2 * sqrtm(c @ d).real), rel=1e-9)
    ours = fid_statistics_to_metric({"mu": m, "sigma": c}, {"mu": n, "sigma": d}, False)
    assert found == pytest.approx(next(iter(ours.values())), rel=1e-6)
    engine = FrechetInceptionDistance(Given(6), input_img_size=(3, 1, 2))
    for side, is_real in ((REAL, True), (MADE, False)):
        engine.update(side.double(), real=is_real)
    assert found == pytest.approx(float(engine.compute()), rel=1e-6)


def test_rank_deficient_covariances_stay_finite():
    few = Moments.of(rows(4, 3))
    value = distance(few.mean, few.covariance, few.mean, few.covariance)
    assert 0 <= value < 1e-6
    other = Moments.of(rows(5, 4, 1.0))
    assert distance(few.mean, few.covariance, other.mean, other.covariance) > 1


def test_inception_score_kernel_distance_and_precision_agree_with_torch_fidelity():
    logits = 2 * rows(100, 5, dim=8)
    found, _ = InceptionScore(splits=10)(drawn_from(logits=logits))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits[order], 10, shuffle=False)
    assert found == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    made = MADE[: len(REAL)]
    one, _ = KernelDistance(subsets=2, subset_size=1000)(drawn_from(made), reference(REAL))
    options = {"kid_subsets": 2, "kid_subset_size": len(REAL), "verbose": False}
    assert one == pytest.approx(
        kid_features_to_metric(made, REAL, **options)["kernel_inception_distance_mean"], rel=1e-4
    )
    prc = prc_features_to_metric(MADE, REAL, prc_neighborhood=3, prc_batch_size=1000, verbose=False)
    assert Precision(3)(drawn_from(MADE), reference(REAL))[0] == pytest.approx(prc["precision"], abs=1e-6)
    assert Recall(3)(drawn_from(MADE), reference(REAL))[0] == pytest.approx(prc["recall"], abs=1e-6)


def test_interval_covers_the_spread_between_independent_sets():
    """The deviation over halves against the deviation over 40 sets, for a Frechet distance."""
    real = reference(rows(2000, 0))
    score = FrechetDistance()
    truth = torch.tensor([score(drawn_from(rows(300, 100 + s, 0.2)), real)[0] for s in range(40)]).std()
    widths = [
        half_width(lambda part: score(part, real)[0], drawn_from(rows(300, 100 + s, 0.2), groups=10), 20)
        for s in range(6)
    ]
    assert float(np.median(widths)) == pytest.approx(1.96 * float(truth), rel=0.4)


def test_messages():
    with pytest.raises(UserError, match="metric.scores.of: unknown choice 'spatal'. Did you mean 'spatial'"):
        FrechetDistance("spatal")
    with pytest.raises(UserError, match="neighbors: expected 1 or more, found 0"):
        Precision(0)
    with pytest.raises(UserError, match="5 nearest neighbours .* found 4 generated and 130"):
        Coverage()(drawn_from(rows(4, 1)), reference(REAL))
