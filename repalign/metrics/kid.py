"""Kernel distance between features."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.image.kid import KernelInceptionDistance

from repalign.errors import UserError
from repalign.metrics.features import Given
from repalign.metrics.reference import Reference


class KernelDistance:
    """Squared maximum mean discrepancy under k(x, y) = (x.y / D + 1)^3, Binkowski et al., ICLR 2018, arXiv:1801.01401.

    Unbiased at any number of pictures, hence the better score of small sets; can be below 0. Mean and standard
    deviation over random subsets by torchmetrics, whose draws are given a seed of their own.

    Args:
        subsets: number of subsets.
        subset_size: pictures in a subset; less when there are fewer pictures (the mean stays unbiased).
        seed: of the choice of subsets.
    """

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self._reference: Reference | None = None
        self._features: list[Tensor] = []

    def set_reference(self, reference: Reference) -> None:
        """The real side.

        Raises:
            UserError: when the file holds moments and no features.
        """
        if len(reference.features) < 2:
            raise UserError(
                f"reference: '{reference.fingerprint}' holds mean and covariance alone; a kernel distance needs "
                "features: take the pictures themselves as reference, or leave this score out of metric.scores"
            )
        self._reference = reference

    def update(self, features: Float[Tensor, "b d"], logits: Float[Tensor, "b k"]) -> None:
        """Add generated pictures."""
        self._features.append(features.detach().cpu().double())

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation over the subsets.

        Raises:
            UserError: without a reference, or with fewer than two generated pictures.
        """
        if self._reference is None:
            raise UserError("metric: a kernel distance needs reference pictures; none were given")
        count = sum(map(len, self._features))
        if count < 2:
            raise UserError(f"num_samples: a kernel distance needs at least 2 generated pictures, found {count}")
        real = self._reference.features.double()
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
            torch.manual_seed(self.seed)
            distance = KernelInceptionDistance(
                Given(real.shape[1]),
                subsets=self.subsets,
                subset_size=min(self.subset_size, count, len(real)),
                sync_on_compute=False,
            )
            distance.update(real, real=True)
            distance.update(torch.cat(self._features), real=False)
            mean, deviation = distance.compute()
        return float(mean), float(deviation)

    def reset(self) -> None:
        """Forget the generated pictures; the reference stays."""
        self._features = []
