"""Numbers that other code gives for fixed features; what ``test_stored.py`` compares ours with.

    python -m tests.metrics.make_stored

Needs SciPy, scikit-learn and prdc 0.2, whose last release is of 2020 and which is no dependency of the project. Takes
nothing from ``repalign``. The features follow from raw 64-bit words of NumPy's Philox, which do not change between
releases: the sum of four uniform numbers each, columns of falling scale.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent / "data" / "stored.json"
REAL, MADE, DIM, SHIFT = 140, 120, 16, 0.15


def rows(key: int, count: int, shift: float = 0.0) -> np.ndarray:
    """[count, DIM], float64."""
    words = np.random.Philox(key=key).random_raw(count * DIM * 4).reshape(count, DIM, 4)
    bells = (words / 2.0**64).sum(2) - 2
    return bells * np.linspace(2.0, 0.2, DIM) + shift


def sides() -> tuple[np.ndarray, np.ndarray]:
    """Real and generated features: the second are shifted, so that every score has something to say."""
    return rows(1, REAL), rows(2, MADE, SHIFT)


def main() -> None:
    """Write the file."""
    from prdc import compute_prdc
    from scipy.linalg import sqrtm
    from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
    from sklearn.preprocessing import normalize

    real, made = sides()
    found: dict[str, float] = {}
    for k in (3, 5):
        found |= {f"{name}_{k}": float(value) for name, value in compute_prdc(real, made, nearest_k=k).items()}
    (m, c), (n, d) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (real, made))
    found["frechet"] = float(((m - n) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real))
    x, y = real[:MADE], made
    xx, yy, xy = (polynomial_kernel(a, b, degree=3, gamma=1 / DIM, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    pairs = MADE * (MADE - 1)
    found["kernel"] = float((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / pairs - 2 * xy.mean())
    x, y = normalize(real), normalize(made)
    xx, yy, xy = (rbf_kernel(a, b, gamma=1 / (2 * 10.0**2)) for a, b in ((x, x), (y, y), (x, y)))
    found["cmmd"] = float(1000 * (xx.mean() + yy.mean() - 2 * xy.mean()))
    packages = ("prdc", "scipy", "scikit-learn", "numpy")
    told = {"values": found, "by": {name: importlib.metadata.version(name) for name in packages}}
    FILE.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
