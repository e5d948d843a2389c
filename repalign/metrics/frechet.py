"""Frechet distance between Gaussians fitted to features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from repalign.errors import UserError
from repalign.metrics.features import Given
from repalign.metrics.reference import Reference


class FrechetDistance:
    """|m_r - m_g|^2 + Tr(C_r + C_g - 2 (C_r C_g)^(1/2)), Heusel et al., NeurIPS 2017, arXiv:1706.08500.

    Sums and eigenvalues in float64 by torchmetrics; 0 is the best. The value falls with the number of generated
    pictures, so numbers are comparable at equal numbers alone.
    """

    def __init__(self) -> None:
        self._reference: Reference | None = None
        self._distance: FrechetInceptionDistance | None = None

    def set_reference(self, reference: Reference) -> None:
        """The real side."""
        self._reference = reference
        self.reset()

    def update(self, features: Float[Tensor, "b d"], logits: Float[Tensor, "b k"]) -> None:
        """Add generated pictures.

        Raises:
            UserError: when the reference was measured with features of another width.
        """
        if self._reference is None:
            raise UserError("metric: a Frechet distance needs reference pictures; none were given")
        if features.shape[1] != len(self._reference.mean):
            raise UserError(
                f"reference: its features have width {len(self._reference.mean)}, the metric's network gives "
                f"{features.shape[1]}; measure the reference with the same network"
            )
        if self._distance is None:
            self._distance = self._filled(self._reference)
        # float64 before it goes in: torchmetrics returns the distance in the type of the features.
        self._distance.update(features.detach().cpu().double(), real=False)

    @staticmethod
    def _filled(reference: Reference) -> FrechetInceptionDistance:
        mean, count = reference.mean, reference.count
        # The caller gives pictures of all ranks, so torchmetrics must not reduce over them again.
        distance = FrechetInceptionDistance(Given(len(mean)), sync_on_compute=False)
        distance.real_features_sum = mean * count
        distance.real_features_cov_sum = reference.covariance * (count - 1) + count * torch.outer(mean, mean)
        distance.real_features_num_samples = torch.tensor(count)
        return distance

    def compute(self) -> tuple[float, None]:
        """The distance.

        Raises:
            UserError: when fewer than two pictures were generated, or a feature was not finite.
        """
        count = 0 if self._distance is None else int(self._distance.fake_features_num_samples)
        if self._distance is None or count < 2:
            raise UserError(f"num_samples: a Frechet distance needs at least 2 generated pictures, found {count}")
        if not self._distance.fake_features_sum.isfinite().all():
            raise UserError("metric: the features of the generated pictures are not finite")
        # Rounding of the square root can leave -1e-5 where the two Gaussians are equal.
        return max(float(self._distance.compute()), 0.0), None

    def reset(self) -> None:
        """Forget the generated pictures; the reference stays."""
        self._distance = None
