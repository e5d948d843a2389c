"""The straight path."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.paths.interpolant import Interpolant
from repalign.state import Coefficients


class LinearPath(Interpolant):
    """alpha_t = 1 - t, sigma_t = t: rectified flow (arXiv:2209.03003), SiT's and REPA's default.

    The velocity is eps - x_0. SiT's own code runs from noise to data: alpha_house(t) = alpha_sit(1 - t), and the
    velocity changes its sign.
    """

    def coefficients(self, t: Float[Tensor, "*b"]) -> Coefficients:
        """Coefficients at t in [0, 1]; the derivatives are -1 and 1."""
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)
