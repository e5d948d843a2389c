"""Kernel distance between features."""

from __future__ import annotations

import torch
from torch import Tensor

from repalign.errors import UserError
from repalign.metrics.drawn import Drawn
from repalign.metrics.reference import Reference


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
        values = []
        for _ in range(self.subsets):
            x = real[torch.randperm(len(real), generator=generator)[:size]]
            y = made[torch.randperm(len(made), generator=generator)[:size]]
            values.append(_unbiased(x, y))
        found = torch.stack(values)
        return float(found.mean()), float(found.std(correction=0))


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    """Of equally large sets; the diagonals of the kernels within a set are left out."""
    size = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
    return within / (size * (size - 1)) - 2 * kernel(x, y).mean()
