"""How alike two representations of the same pictures are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError

ROWS = 1024  # of a kernel at once, so that memory grows with the number of pictures and not with its square


def cknna(first: Float[Tensor, "n d"], second: Float[Tensor, "n e"], neighbors: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of two feature sets, row i of both from picture i.

    CKNNA = A(K, L) / sqrt(A(K, K) A(L, L)) with A(K, L) = sum_{i, j} a_ij (K_ij - mean_l K_il) (L_ij - mean_l L_il),
    K and L the inner products within a set, and a_ij = 1 where j is among the nearest neighbours of i in both sets and
    j is not i. 1 for equal sets; about neighbors / n for independent ones; rotations and a common scale change
    nothing. Centred kernel alignment is the case of all neighbours. Features are first scaled to unit length, so that
    neighbours are by cosine; computed in float64.

    Source: Huh et al., arXiv:2405.07987; REPA, arXiv:2410.06940, which takes k = 10 on 10,000 pictures. It is the
    equation that is followed; the figures of no code were compared with.

    Args:
        first: features of one representation.
        second: of the other, which may have another width.
        neighbors: number k of nearest neighbours.

    Raises:
        UserError: when the sets are of different sizes, or have no k other pictures.
    """
    size = len(first)
    if len(second) != size:
        raise UserError(f"alignment: {size} and {len(second)} pictures; both sets must be features of the same ones")
    if not 1 <= neighbors < size:
        raise UserError(f"alignment: neighbors must be in [1, {size - 1}] for {size} pictures, found {neighbors}")
    a, b = (F.normalize(features.double(), dim=1) for features in (first, second))
    both, own_a, own_b = a.new_zeros(()), a.new_zeros(()), a.new_zeros(())
    for start in range(0, size, ROWS):
        (k, near_a), (l, near_b) = (_rows(features, start, neighbors) for features in (a, b))
        both += (k * l)[near_a & near_b].sum()
        own_a += (k * k)[near_a].sum()
        own_b += (l * l)[near_b].sum()
    return float(both / (own_a * own_b).sqrt())


def _rows(features: Tensor, start: int, neighbors: int) -> tuple[Tensor, Tensor]:
    """Some rows of the kernel, each minus its mean, and where their nearest neighbours are."""
    kernel = features[start : start + ROWS] @ features.T
    others = kernel.clone()
    others.diagonal(start).fill_(-torch.inf)
    nearest = others.topk(neighbors, dim=1).indices
    near = torch.zeros_like(kernel, dtype=torch.bool).scatter_(1, nearest, True)
    return kernel - kernel.mean(1, keepdim=True), near


def cka(first: Float[Tensor, "n d"], second: Float[Tensor, "n e"]) -> float:
    """Linear centred kernel alignment of two feature sets, row i of both from picture i.

    |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F) with centred columns; in [0, 1], 1 for sets that are equal up to rotation and a
    common scale. With few pictures against the widths it is high for independent sets too. Computed in float64.

    Source: Kornblith et al., ICML 2019, arXiv:1905.00414, equation 5.

    Args:
        first: features of one representation.
        second: of the other, which may have another width.

    Raises:
        UserError: when the sets are of different sizes.
    """
    if len(first) != len(second):
        raise UserError(f"alignment: {len(first)} and {len(second)} pictures; both sets must be of the same ones")
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    own = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return float(torch.linalg.matrix_norm(x.T @ y).square() / own)
