"""Weights of a squared error, one number per sample from its coefficients."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from repalign.paths.parametrization import linear_drift
from repalign.state import Coefficients


class Weighting(Protocol):
    """From coefficients to weights [B]."""

    def __call__(self, c: Coefficients) -> Float[Tensor, " b"]: ...


class LikelihoodWeight:
    """g / sigma^2 on the error of the noise, g of :func:`repalign.paths.parametrization.linear_drift`.

    The maximum-likelihood weighting (arXiv:2101.09258) in SiT's normalisation, for noise and score predictions; use it
    with ``error: Noise``. SiT's ``velocity`` weight (g / sigma)^2 on the same error needs no weighting here: it is the
    error of the velocity, ``error: Velocity``.
    """

    def __call__(self, c: Coefficients) -> Float[Tensor, " b"]:
        return linear_drift(c)[1] / c.sigma**2
