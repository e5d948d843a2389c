"""Frechet distance between Gaussians fitted to features."""

from __future__ import annotations

from repalign.errors import UserError, unknown_choice
from repalign.metrics.drawn import MOMENTS, Drawn
from repalign.metrics.moments import distance
from repalign.metrics.reference import Reference


class FrechetDistance:
    """|m_r - m_g|^2 + Tr(C_r + C_g - 2 (C_r C_g)^(1/2)), Heusel et al., NeurIPS 2017, arXiv:1706.08500.

    Streaming sums and symmetric eigen-decompositions in float64 (:func:`repalign.metrics.moments.distance`); 0 is the
    best. The value falls with the number of generated pictures: numbers are comparable at equal numbers alone.

    Args:
        of: ``pooled`` features (FID on Inception's), or ``spatial`` ones: sFID on the first 7 channels of an early map,
            Nash et al., arXiv:2103.03841.

    Raises:
        UserError: for other features.
    """

    def __init__(self, of: str = "pooled") -> None:
        if of not in MOMENTS:
            raise unknown_choice("metric.scores.of", of, MOMENTS)
        self.of = of
        self.needs = frozenset({of})
        self.needs_reference = self.needs

    def __call__(self, drawn: Drawn, reference: Reference) -> tuple[float, None]:
        """The distance.

        Raises:
            UserError: when the reference was measured with features of another width, fewer than two pictures were
                generated, or a feature was not finite.
        """
        moments = drawn.moments(self.of)
        real_mean, real_covariance = reference.moments(self.of)
        if len(real_mean) != len(moments.total):
            raise UserError(
                f"reference: its {self.of} features have width {len(real_mean)}, the metric's network gives "
                f"{len(moments.total)}; measure the reference with the same network"
            )
        root = reference.root(self.of)
        return distance(real_mean, real_covariance, moments.mean, moments.covariance, root), None
