"""Our scores on fixed features against numbers that other code gave for them (``make_stored.py``)."""

import json

import pytest
import torch

from repalign.metrics import kid
from repalign.metrics.discrepancy import GaussianDiscrepancy
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.kid import KernelDistance
from repalign.metrics.manifold import Coverage, Density, Precision, Recall
from repalign.metrics.moments import Moments
from repalign.metrics.reference import Reference
from tests.metrics.make_stored import FILE, MADE, sides
from tests.metrics.small import drawn_from

STORED = json.loads(FILE.read_text())["values"]
BALLS = {"precision": Precision, "recall": Recall, "density": Density, "coverage": Coverage}


def reference(features):
    moments = Moments.of(features)
    return Reference(moments.mean, moments.covariance, len(features), features, "given")


@pytest.fixture(scope="module")
def given():
    real, made = (torch.from_numpy(side) for side in sides())
    return real, made


@pytest.mark.parametrize("name", sorted(STORED))
def test_a_stored_number(given, name):
    real, made = given
    kind, _, k = name.partition("_")
    if kind in BALLS:
        score, tolerance = BALLS[kind](int(k)), 1e-12  # counts: all or nothing
    else:
        scores = {"frechet": FrechetDistance(), "kernel": KernelDistance(2, MADE), "cmmd": GaussianDiscrepancy()}
        score, tolerance = scores[kind], 1e-7  # rows are kept in float32
    real = real[:MADE] if kind == "kernel" else real
    found, _ = score(drawn_from(made), reference(real))
    assert found == pytest.approx(STORED[name], rel=tolerance)
    assert 0.02 < abs(found), "a trivial number shows nothing"


def test_both_ways_to_a_kernel_distance_agree(given, monkeypatch):
    """One kernel of all rows, and one for each subset."""
    real, made = given
    score, found = KernelDistance(subsets=12, subset_size=50, seed=3), {}
    for name in ("_of_whole", "_one_by_one"):
        with monkeypatch.context() as patched:
            patched.setattr(kid, "_of_whole", getattr(kid, name))
            patched.setattr(kid, "_one_by_one", getattr(kid, name))
            patched.setattr(kid, "ROWS", 37)
            found[name] = score(drawn_from(made), reference(real))
    assert found["_of_whole"] == pytest.approx(found["_one_by_one"], rel=1e-9)
    assert found["_of_whole"][1] > 0
