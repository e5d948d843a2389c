"""CKNNA: its laws, and its measurement on a backbone."""

import pytest
import torch

from repalign.errors import UserError
from repalign.metrics import alignment
from repalign.metrics.alignment import cknna


def features(size: int = 400, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


def test_equal_features_are_aligned():
    assert cknna(features(), features()) == pytest.approx(1, abs=1e-12)


def test_rotations_and_scales_change_nothing():
    x, y = features(), features() + features(seed=1)
    rotation = torch.linalg.qr(features(16, 16, seed=2).double()).Q
    assert cknna(x.double() @ rotation, y) == pytest.approx(cknna(x, y), rel=1e-9)
    assert cknna(3 * x.double(), y) == pytest.approx(cknna(x, y), rel=1e-9)
    assert cknna(x.double(), 3 * x.double() @ rotation) == pytest.approx(1, abs=1e-9)


def test_independent_features_are_not():
    assert abs(cknna(features(1000), features(1000, 24, seed=1))) < 0.03


def test_the_more_noise_the_less_alignment_and_the_order_does_not_matter():
    x, noise = features(), features(seed=1)
    values = [cknna(x, x + level * noise) for level in (0.1, 0.5, 2.0)]
    assert 1 > values[0] > values[1] > values[2] > 0
    assert cknna(x + noise, x) == pytest.approx(cknna(x, x + noise), rel=1e-12)


def test_it_is_the_written_sum():
    """Against the formula, entry by entry."""
    k_neighbors, x, y = 3, features(12, 4).double(), features(12, 5, seed=1).double()
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)

    def near(z, i):
        order = sorted((j for j in range(12) if j != i), key=lambda j: -float(z[i] @ z[j]))
        return set(order[:k_neighbors])

    def total(u, v):
        return sum(
            float((u[i] @ u[j] - (u @ u[i]).mean()) * (v[i] @ v[j] - (v @ v[i]).mean()))
            for i in range(12)
            for j in near(u, i) & near(v, i)
        )

    expected = total(x, y) / (total(x, x) * total(y, y)) ** 0.5
    assert cknna(x, y, k_neighbors) == pytest.approx(expected, rel=1e-9)


def test_rows_at_once_do_not_matter(monkeypatch):
    x, y = features(), features() + features(seed=1)
    whole = cknna(x, y)
    monkeypatch.setattr(alignment, "ROWS", 37)
    assert cknna(x, y) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(("second", "neighbors", "message"), [(7, 3, "8 and 7 pictures"), (8, 8, r"in \[1, 7\]")])
def test_sets_that_cannot_be_compared_say_so(second, neighbors, message):
    with pytest.raises(UserError, match=message):
        cknna(features(8), features(second), neighbors)
