"""Mean and covariance of a stream of vectors, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of outer products of vectors: what adds up over batches, groups and processes.

    Attributes:
        count: number of vectors, as a float64 scalar.
        total: their sum [D], float64.
        outer: sum of x x^T, [D, D], float64.
    """

    count: Float[Tensor, ""]
    total: Float[Tensor, " d"]
    outer: Float[Tensor, "d d"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moments:
        """Of these vectors."""
        wide = rows.detach().cpu().double()
        return cls(torch.tensor(float(len(wide)), dtype=torch.float64), wide.sum(0), wide.T @ wide)

    @classmethod
    def none(cls, dim: int) -> Moments:
        """Of no vector."""
        return cls.of(torch.empty(0, dim))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """[D]."""
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """[D, D] with divisor count - 1."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def root_of(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric square root C^(1/2) in float64; eigenvalues that rounding leaves below 0 count as 0."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def distance(
    mean: Float[Tensor, " d"],
    covariance: Float[Tensor, "d d"],
    other_mean: Float[Tensor, " d"],
    other_covariance: Float[Tensor, "d d"],
    root: Float[Tensor, "d d"] | None = None,
) -> float:
    """Frechet distance of two Gaussians: |m - n|^2 + Tr(C + D - 2 (C D)^(1/2)).

    Tr (C D)^(1/2) is the sum of the square roots of the eigenvalues of S D S with S = C^(1/2), both from symmetric
    eigen-decompositions in float64: no general matrix square root, whose result depends on the build of SciPy
    (scipy#19415). Eigenvalues that rounding leaves below 0 count as 0, and so does a distance that it does.

    Args:
        mean: m.
        covariance: C.
        other_mean: n.
        other_covariance: D.
        root: S, when it is known (:func:`root_of`); None: it is computed.
    """
    root = root_of(covariance) if root is None else root
    cross = torch.linalg.eigvalsh(root @ other_covariance.double() @ root).clamp(min=0).sqrt().sum()
    difference = (mean.double() - other_mean.double()).square().sum()
    return max(float(difference + covariance.trace() + other_covariance.trace() - 2 * cross), 0.0)
