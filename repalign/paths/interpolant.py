"""What all paths between data and noise share."""

from __future__ import annotations

import abc
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from repalign.state import Coefficients, PathSample, State, expand, map_state


def scale(coefficient: Tensor, state: State) -> State:
    """Multiply a state [B, ...] by one coefficient per sample [B], or by a scalar; the state keeps its dtype."""
    if coefficient.ndim == 0:
        # A scalar on the host multiplies a tensor on any device without a copy.
        return map_state(lambda x: x * coefficient, state)
    return state * expand(coefficient, state)


class Interpolant(abc.ABC):
    """A Gaussian path x_t = alpha_t x_0 + sigma_t eps from data (t = 0) to noise (t = 1).

    A path states its coefficients; everything else follows from them (:mod:`repalign.paths.parametrization`).

    Attributes:
        singular_at_data: whether d sigma_t / dt is infinite at t = 0, so that times have to stay away from it.
    """

    singular_at_data: ClassVar[bool] = False

    @abc.abstractmethod
    def coefficients(self, t: Float[Tensor, "*b"]) -> Coefficients:
        """alpha_t, sigma_t and their derivatives by t, each shaped like t and of its dtype."""

    def sample(self, x_0: State, eps: State, t: Float[Tensor, " b"]) -> PathSample:
        """The point x_t = alpha_t x_0 + sigma_t eps of every sample, [B, ...]."""
        c = self.coefficients(t)
        return PathSample(scale(c.alpha, x_0) + scale(c.sigma, eps), t, x_0, eps, c)
