"""Weights of a squared error, one number per sample from its coefficients."""

from __future__ import annotations

import math
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
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


class RatioWeight:
    """alpha / sigma, kept within [low, high]; infinite at t = 0 without a bound.

    DDT's ``snr`` has no bound, its ``minsnr`` low = 5 and its ``maxsnr`` high = 5: for its direction of time the names
    of the last two are exchanged.

    Args:
        low, high: bounds; None for none.

    Raises:
        UserError: when ``low`` is above ``high``.
    """

    def __init__(self, low: float | None = None, high: float | None = None) -> None:
        if low is not None and high is not None and low > high:
            raise UserError(f"objective.weighting: expected low <= high, found low={low}, high={high}")
        self.low = low
        self.high = high

    def __call__(self, c: Coefficients) -> Float[Tensor, " b"]:
        ratio = c.alpha / c.sigma
        return ratio if self.low is self.high is None else ratio.clamp(self.low, self.high)


class InverseVarianceWeight:
    """1 / sigma^2; infinite at t = 0 (DDT's ``inverse_sigma``)."""

    def __call__(self, c: Coefficients) -> Float[Tensor, " b"]:
        return 1 / c.sigma**2


class CosMapWeight:
    """2 / (pi (alpha^2 + sigma^2)): the density of :class:`repalign.paths.time.CosMap` on the linear path, as a weight.

    With uniform times the same expectation as those times without a weight (``cosmap`` of the training scripts of
    diffusers; its ``sigma_sqrt`` is :class:`InverseVarianceWeight`).
    """

    def __call__(self, c: Coefficients) -> Float[Tensor, " b"]:
        return 2 / (math.pi * (c.alpha**2 + c.sigma**2))
