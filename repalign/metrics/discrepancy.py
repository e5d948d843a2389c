"""Maximum mean discrepancy under a Gaussian kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from repalign.errors import UserError
from repalign.metrics.drawn import Drawn
from repalign.metrics.reference import Reference

ROWS = 1000  # of a kernel at once


class GaussianDiscrepancy:
    """scale (E k(x, x') + E k(y, y') - 2 E k(x, y)) with k(x, y) = exp(-|x - y|^2 / (2 sigma^2)); 0 is the best.

    On the unit-length image embeddings of CLIP ViT-L/14 at 336 px with sigma = 10 and scale = 1000 this is CMMD
    (Jayasumana et al., arXiv:2401.09603). The means run over all pairs, a row with itself included, so the value is a
    little above 0 for two halves of one set. In float64.

    Args:
        sigma: width of the kernel.
        scale: factor, to have numbers that are easy to read.
    """

    needs = frozenset({"features"})
    needs_reference = needs

    def __init__(self, sigma: float = 10.0, scale: float = 1000.0) -> None:
        self.sigma, self.scale = sigma, scale

    def __call__(self, drawn: Drawn, reference: Reference) -> tuple[float, None]:
        """The discrepancy.

        Raises:
            UserError: when no picture was generated.
        """
        if drawn.count < 1:
            raise UserError("num_samples: a discrepancy needs generated pictures, found 0")
        real, made = (F.normalize(x.double(), dim=1) for x in (reference.features, drawn.rows("features")))
        found = self._mean(real, real) + self._mean(made, made) - 2 * self._mean(real, made)
        return float(self.scale * found), None

    def _mean(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of the kernel between rows of unit length: |x - y|^2 = 2 - 2 x.y."""
        parts = [((part @ y.T - 1) / self.sigma**2).exp().sum() for part in x.split(ROWS)]
        return torch.stack(parts).sum() / (len(x) * len(y))
