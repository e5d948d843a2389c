"""Pairs of vectors that are alike: exact, in blocks of rows, within clusters where the set is large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 2**25  # similarities at once
SLACK = 1e-6  # rounding of a product of unit vectors in float32: copies are alike by 1 - SLACK at least
_ROUNDS = 10  # of k-means
_PER_CLUSTER = 256  # rows that centres are fitted on, a cluster


def similar_pairs(
    plain: Float[Tensor, "n d"], mirrored: Float[Tensor, "n d"], threshold: float, clusters: int | None, seed: int = 0
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], Float[np.ndarray, " p"]]:
    """Pairs i < j with max(x_i . x_j, m_i . x_j, x_i . m_j) >= threshold, and that maximum.

    Without clusters every pair is compared. With K clusters a pair is compared where x_j lies in the cluster of x_i, or
    x_j in that of m_i: about N^2 / K products instead of N^2, and pairs across a border are missed (SD3 and SSCD's
    deduplication do the same, K = 16,000).

    Args:
        plain: x, unit rows of the pictures.
        mirrored: m, unit rows of the pictures mirrored left to right.
        threshold: cosine; ``SLACK`` is granted for rounding.
        clusters: K; None for all pairs.
        seed: of the first centres.
    """
    queries = torch.cat([plain, mirrored])
    if clusters is None or clusters >= len(plain):
        of = torch.zeros(len(queries), dtype=torch.long)
    else:
        of = _nearest(queries, _centres(plain, clusters, seed))
    found: dict[tuple[int, int], float] = {}
    for first, second, value in _within(plain, queries, of, threshold - SLACK):
        pair = (min(first, second), max(first, second))
        found[pair] = max(value, found.get(pair, -1.0))
    ordered = sorted(found)
    pairs = np.array(ordered, dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.array([found[pair] for pair in ordered], dtype=np.float64)


def _within(
    plain: Float[Tensor, "n d"], queries: Float[Tensor, "q d"], of: Int[Tensor, " q"], least: float
) -> Iterator[tuple[int, int, float]]:
    count = len(plain)
    by_cluster = torch.argsort(of, stable=True)
    for rows in torch.split(by_cluster, torch.bincount(of).tolist()):
        members = rows[rows < count]
        if not len(members):
            continue
        for part in rows.split(max(1, BLOCK // len(members))):
            alike = queries[part] @ plain[members].T
            first, second = (alike >= least).nonzero(as_tuple=True)
            a, b, values = part[first] % count, members[second], alike[first, second]
            # A symmetrical picture is its own mirror image; a plain pair is met from both sides.
            wanted = (a != b) & ((part[first] >= count) | (a < b))
            yield from zip(a[wanted].tolist(), b[wanted].tolist(), values[wanted].tolist(), strict=True)


def _centres(plain: Float[Tensor, "n d"], clusters: int, seed: int) -> Float[Tensor, "k d"]:
    """Spherical k-means (Lloyd) from centres drawn among the rows, on at most 256 rows a cluster."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(plain))
    fitted = plain[torch.from_numpy(order[: clusters * _PER_CLUSTER])]
    centres = fitted[:clusters].clone()
    for _ in range(_ROUNDS):
        of = _nearest(fitted, centres)
        sums = torch.zeros_like(centres).index_add_(0, of, fitted)
        filled = torch.bincount(of, minlength=clusters) > 0  # an empty cluster keeps its centre
        centres[filled] = torch.nn.functional.normalize(sums[filled], dim=1)
    return centres


def _nearest(rows: Float[Tensor, "n d"], centres: Float[Tensor, "k d"]) -> Int[Tensor, " n"]:
    return torch.cat([(part @ centres.T).argmax(1) for part in rows.split(max(1, BLOCK // len(centres)))])
