"""The trigonometric path."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.paths.interpolant import Interpolant
from repalign.state import Coefficients


class GVPPath(Interpolant):
    """alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2): generalised variance preserving (SiT), REPA's ``cosine``.

    alpha^2 + sigma^2 = 1 for all t; SiT's own code runs from noise to data (t_sit = 1 - t).
    """

    def coefficients(self, t: Float[Tensor, "*b"]) -> Coefficients:
        """Coefficients at t in [0, 1]."""
        quarter = math.pi / 2
        # sin(pi/2 (1 - t)) instead of cos(pi/2 t): it is exactly 0 at t = 1, where the cosine rounds to -4e-8.
        alpha, sigma = torch.sin(quarter * (1 - t)), torch.sin(quarter * t)
        return Coefficients(alpha, sigma, -quarter * sigma, quarter * alpha)
