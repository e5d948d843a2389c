"""What a network may predict, and how each prediction converts to the other quantities.

With x_t = alpha x_0 + sigma eps and v = alpha' x_0 + sigma' eps (primes: derivatives by t) any two of x_t, x_0, eps, v
fix the rest; the score is s = grad log p_t(x_t) = -E[eps | x_t] / sigma. The formulas hold for every path, so no path
knows a parametrization. Conversions from the velocity divide by the determinant alpha sigma' - alpha' sigma, which is 1
on the linear path and pi/2 on the trigonometric one, hence finite at both ends; the others divide by alpha or sigma,
which is what :func:`repalign.paths.interval.time_interval` keeps times away from.

Source: SiT (arXiv:2401.08740), section 2 and the appendix on conversions, in the house's direction of time.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from repalign.paths.interpolant import scale
from repalign.protocols import Parametrization
from repalign.state import Coefficients, PathSample, State


class Quantity(Parametrization, Protocol):
    """A parametrization that also reads its own quantity off another's prediction (to measure an error in it)."""

    def read(self, source: Parametrization, pred: State, x_t: State, c: Coefficients) -> State: ...


def linear_drift(c: Coefficients) -> tuple[Tensor, Tensor]:
    """The pair f, g of the forward diffusion dx = f x dt + sqrt(2 g) dW whose marginals are the path's.

    f = alpha'/alpha, g = sigma sigma' - (alpha'/alpha) sigma^2, each [B] or a scalar; the velocity is f x - g s. On the
    variance-preserving path f = -beta/2 and g = beta/2; on the linear path g = t / (1 - t), infinite at t = 1.
    """
    f = c.d_alpha / c.alpha
    return f, c.sigma * c.d_sigma - f * c.sigma**2


class Velocity:
    """v = dx_t/dt = alpha' x_0 + sigma' eps (on the linear path: eps - x_0)."""

    divides = False

    def target(self, sample: PathSample) -> State:
        """The velocity of every sample."""
        c = sample.coefficients
        return scale(c.d_alpha, sample.x_0) + scale(c.d_sigma, sample.eps)

    def velocity(self, pred: State, x_t: State, c: Coefficients) -> State:
        """The prediction itself."""
        return pred

    def data(self, pred: State, x_t: State, c: Coefficients) -> State:
        """x_0 = (sigma' x_t - sigma v) / (alpha sigma' - alpha' sigma)."""
        determinant = c.alpha * c.d_sigma - c.d_alpha * c.sigma
        return scale(c.d_sigma / determinant, x_t) - scale(c.sigma / determinant, pred)

    def noise(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Eps = (alpha v - alpha' x_t) / (alpha sigma' - alpha' sigma)."""
        determinant = c.alpha * c.d_sigma - c.d_alpha * c.sigma
        return scale(c.alpha / determinant, pred) - scale(c.d_alpha / determinant, x_t)

    def score(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Score = -eps / sigma; infinite at t = 0."""
        return scale(-1 / c.sigma, self.noise(pred, x_t, c))

    def read(self, source: Parametrization, pred: State, x_t: State, c: Coefficients) -> State:
        """The velocity that another parametrization's prediction stands for."""
        return source.velocity(pred, x_t, c)


class Noise:
    """The noise eps (DDPM, LDM, DiT)."""

    divides = True

    def target(self, sample: PathSample) -> State:
        """The noise of every sample."""
        return sample.eps

    def velocity(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Velocity = (alpha'/alpha) x_t + (sigma' - sigma alpha'/alpha) eps; infinite where alpha = 0."""
        f = c.d_alpha / c.alpha
        return scale(f, x_t) + scale(c.d_sigma - f * c.sigma, pred)

    def data(self, pred: State, x_t: State, c: Coefficients) -> State:
        """x_0 = (x_t - sigma eps) / alpha; infinite where alpha = 0."""
        return scale(1 / c.alpha, x_t) - scale(c.sigma / c.alpha, pred)

    def noise(self, pred: State, x_t: State, c: Coefficients) -> State:
        """The prediction itself."""
        return pred

    def score(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Score = -eps / sigma; infinite at t = 0."""
        return scale(-1 / c.sigma, pred)

    def read(self, source: Parametrization, pred: State, x_t: State, c: Coefficients) -> State:
        """The noise that another parametrization's prediction stands for."""
        return source.noise(pred, x_t, c)


class Data:
    """The clean state x_0 (JiT's parametrization)."""

    divides = True

    def target(self, sample: PathSample) -> State:
        """The clean state of every sample."""
        return sample.x_0

    def velocity(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Velocity = (sigma'/sigma) x_t + (alpha' - alpha sigma'/sigma) x_0; infinite at t = 0."""
        ratio = c.d_sigma / c.sigma
        return scale(ratio, x_t) + scale(c.d_alpha - ratio * c.alpha, pred)

    def data(self, pred: State, x_t: State, c: Coefficients) -> State:
        """The prediction itself."""
        return pred

    def noise(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Eps = (x_t - alpha x_0) / sigma; infinite at t = 0."""
        return scale(1 / c.sigma, x_t) - scale(c.alpha / c.sigma, pred)

    def score(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Score = (alpha x_0 - x_t) / sigma^2; infinite at t = 0."""
        return scale(c.alpha / c.sigma**2, pred) - scale(1 / c.sigma**2, x_t)

    def read(self, source: Parametrization, pred: State, x_t: State, c: Coefficients) -> State:
        """The clean state that another parametrization's prediction stands for."""
        return source.data(pred, x_t, c)


class Score:
    """The score s = grad_x log p_t(x_t), whose regression target is -eps / sigma.

    The target is unbounded near t = 0. SiT therefore measures the error of a score as an error of the noise it stands
    for, mean (sigma s + eps)^2: give the objective ``error: Noise``.
    """

    divides = True

    def target(self, sample: PathSample) -> State:
        """-eps / sigma of every sample; infinite at t = 0."""
        return scale(-1 / sample.coefficients.sigma, sample.eps)

    def velocity(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Velocity = f x_t - g s with f and g of :func:`linear_drift`; infinite where alpha = 0."""
        f, g = linear_drift(c)
        return scale(f, x_t) - scale(g, pred)

    def data(self, pred: State, x_t: State, c: Coefficients) -> State:
        """x_0 = (x_t + sigma^2 s) / alpha (Tweedie's formula); infinite where alpha = 0."""
        return scale(1 / c.alpha, x_t) + scale(c.sigma**2 / c.alpha, pred)

    def noise(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Eps = -sigma s."""
        return scale(-c.sigma, pred)

    def score(self, pred: State, x_t: State, c: Coefficients) -> State:
        """The prediction itself."""
        return pred

    def read(self, source: Parametrization, pred: State, x_t: State, c: Coefficients) -> State:
        """The score that another parametrization's prediction stands for."""
        return source.score(pred, x_t, c)
