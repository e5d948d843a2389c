"""Precision, recall, density and coverage: balls around nearest neighbours in feature space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
from repalign.metrics.drawn import Drawn
from repalign.metrics.reference import Reference

ROWS = 1000  # of a matrix of distances at once, so that memory does not grow with the square


class _Balls(ABC):
    """Scores of two sets of rows.

    A ball around a row reaches to its k-th nearest other row of the same set. Distances are Euclidean, in float64.

    Args:
        neighbors: k.

    Raises:
        UserError: for k below 1; later when a set has too few rows.
    """

    needs = frozenset({"features"})
    needs_reference = needs

    def __init__(self, neighbors: int) -> None:
        if neighbors < 1:
            raise UserError(f"metric.scores.neighbors: expected 1 or more, found {neighbors}")
        self.neighbors = neighbors

    def __call__(self, drawn: Drawn, reference: Reference) -> tuple[float, None]:
        """The score.

        Raises:
            UserError: when one of the sets has no k other rows.
        """
        real, made = reference.features.double(), drawn.rows("features").double()
        if min(len(real), len(made)) <= self.neighbors:
            raise UserError(
                f"num_samples: {self.neighbors} nearest neighbours need more pictures than that on both sides, found "
                f"{len(made)} generated and {len(real)} of the reference"
            )
        return self.score(real, made), None

    @abstractmethod
    def score(self, real: Float[Tensor, "n d"], made: Float[Tensor, "m d"]) -> float:
        """Of float64 rows."""

    def radii(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Squared distance of every row to its k-th nearest other row; a row itself is its first."""
        return torch.cat([part.kthvalue(self.neighbors + 1, dim=1).values for part in _squared(rows, rows)])


class Precision(_Balls):
    """The share of generated pictures inside a ball of the reference. Kynkaanniemi et al., arXiv:1904.06991.

    The ADM evaluator takes k = 3, all generated pictures and the reference batch's 10,000.

    Args:
        neighbors: k.
    """

    def __init__(self, neighbors: int = 3) -> None:
        super().__init__(neighbors)

    def score(self, real: Tensor, made: Tensor) -> float:
        """Of float64 rows."""
        radii = self.radii(real)
        return float(torch.cat([(part <= radii).any(1) for part in _squared(made, real)]).double().mean())


class Recall(_Balls):
    """The share of reference pictures inside a ball of the generated ones: precision with the sides swapped.

    Kynkaanniemi et al., arXiv:1904.06991.

    Args:
        neighbors: k.
    """

    def __init__(self, neighbors: int = 3) -> None:
        super().__init__(neighbors)

    def score(self, real: Tensor, made: Tensor) -> float:
        """Of float64 rows."""
        return Precision(self.neighbors).score(made, real)


class Density(_Balls):
    """In how many balls of the reference a generated picture lies, divided by k; may exceed 1.

    Naeem et al., ICML 2020, arXiv:2002.09797.

    Args:
        neighbors: k.
    """

    def __init__(self, neighbors: int = 5) -> None:
        super().__init__(neighbors)

    def score(self, real: Tensor, made: Tensor) -> float:
        """Of float64 rows."""
        radii = self.radii(real)
        inside = torch.cat([(part < radii).sum(1) for part in _squared(made, real)])
        return float(inside.double().mean()) / self.neighbors


class Coverage(_Balls):
    """The share of reference pictures whose ball holds a generated one. Naeem et al., ICML 2020, arXiv:2002.09797.

    Args:
        neighbors: k.
    """

    def __init__(self, neighbors: int = 5) -> None:
        super().__init__(neighbors)

    def score(self, real: Tensor, made: Tensor) -> float:
        """Of float64 rows."""
        nearest = torch.cat([part.amin(1) for part in _squared(real, made)])
        return float((nearest < self.radii(real)).double().mean())


def _squared(rows: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Iterator[Float[Tensor, "r m"]]:
    """Squared distances, some rows at a time."""
    norms = others.square().sum(1)
    for part in rows.split(ROWS):
        yield (part.square().sum(1, keepdim=True) + norms - 2 * part @ others.T).clamp(min=0)
