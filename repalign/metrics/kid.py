"""Kernel distance between features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repalign.errors import UserError
from repalign.metrics.drawn import Drawn
from repalign.metrics.reference import Reference

ROWS = 1000  # of a kernel at once


class KernelDistance:
    """Squared maximum mean discrepancy under k(x, y) = (x.y / D + 1)^3, Binkowski et al., ICLR 2018, arXiv:1801.01401.

    Unbiased at any number of pictures, hence the better score of small sets; can be below 0. Mean and standard
    deviation over random subsets, whose draws have a seed of their own. In float64.

    Args:
        subsets: number of subsets.
        subset_size: pictures in a subset; less when there are fewer pictures (the mean stays unbiased).
        seed: of the choice of subsets.
    """

    needs = frozenset({"features"})
    needs_reference = needs

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def __call__(self, drawn: Drawn, reference: Reference) -> tuple[float, float]:
        """Mean and standard deviation over the subsets.

        Raises:
            UserError: when fewer than two pictures were generated.
        """
        if drawn.count < 2:
            raise UserError(f"num_samples: a kernel distance needs at least 2 generated pictures, found {drawn.count}")
        real, made = reference.features.double(), drawn.rows("features").double()
        size = min(self.subset_size, len(real), len(made))
        generator = torch.Generator().manual_seed(self.seed)
        chosen = [
            (
                torch.randperm(len(real), generator=generator)[:size],
                torch.randperm(len(made), generator=generator)[:size],
            )
            for _ in range(self.subsets)
        ]
        pairs = len(real) ** 2 + len(made) ** 2 + len(real) * len(made)
        values = _of_whole if pairs < 3 * self.subsets * size**2 else _one_by_one
        found = values(real, made, chosen)
        return float(found.mean()), float(found.std(correction=0))


Chosen = list[tuple[Tensor, Tensor]]  # rows of the reference and generated rows, equally many, in each subset


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _one_by_one(real: Tensor, made: Tensor, chosen: Chosen) -> Tensor:
    """A kernel for each subset: for sets that are much larger than the subsets."""
    values = []
    for x, y in ((real[rows], made[others]) for rows, others in chosen):
        within = sum(k.sum() - k.trace() for k in (_kernel(x, x), _kernel(y, y)))
        values.append(within / (len(x) * (len(x) - 1)) - 2 * _kernel(x, y).mean())
    return torch.stack(values)


def _of_whole(real: Tensor, made: Tensor, chosen: Chosen) -> Tensor:
    """The kernel of all rows once; with s in {0, 1}^n for a subset, the sum of its entries there is s^T K s."""
    size = len(chosen[0][0])
    of_real, of_made = (
        _marked(rows, count) for rows, count in zip(zip(*chosen, strict=True), (len(real), len(made)), strict=True)
    )
    within = sum(
        _sums(x, x, marks, marks) - marks @ (x.square().sum(1) / x.shape[1] + 1) ** 3
        for x, marks in ((real, of_real), (made, of_made))
    )
    return within / (size * (size - 1)) - 2 * _sums(real, made, of_real, of_made) / size**2


def _marked(chosen: Sequence[Tensor], count: int) -> Tensor:
    """[subsets, n], 1 where a row is in a subset."""
    marks = torch.zeros(len(chosen), count, dtype=torch.float64)
    return marks.scatter_(1, torch.stack(list(chosen)), 1)


def _sums(x: Tensor, y: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    """Sum of the kernel between the chosen rows, for every subset."""
    columns = torch.zeros_like(of_y)
    for start in range(0, len(x), ROWS):
        columns += of_x[:, start : start + ROWS] @ _kernel(x[start : start + ROWS], y)
    return (columns * of_y).sum(1)
