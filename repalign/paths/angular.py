"""The v-prediction of progressive distillation."""

from __future__ import annotations

from repalign.paths.interpolant import scale
from repalign.protocols import Parametrization
from repalign.state import Coefficients, PathSample, State


class AngularVelocity:
    """v = alpha eps - sigma x_0 (arXiv:2202.00512, appendix D; Stable Diffusion 2's ``v_prediction``).

    On a variance-preserving path with alpha = cos(phi), sigma = sin(phi) this is dx/dphi: the velocity dx/dt over
    dphi/dt. On other paths nothing is lost either, since n = alpha^2 + sigma^2 is never 0: x_0 = (alpha x_t - sigma v)
    / n and eps = (sigma x_t + alpha v) / n, so that no conversion to these two is singular.
    """

    divides = True  # the score is still divided by sigma

    def target(self, sample: PathSample) -> State:
        """The angular velocity of every sample."""
        c = sample.coefficients
        return scale(c.alpha, sample.eps) - scale(c.sigma, sample.x_0)

    def velocity(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Velocity = alpha' x_0 + sigma' eps."""
        return scale(c.d_alpha, self.data(pred, x_t, c)) + scale(c.d_sigma, self.noise(pred, x_t, c))

    def data(self, pred: State, x_t: State, c: Coefficients) -> State:
        """x_0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2)."""
        norm = c.alpha**2 + c.sigma**2
        return scale(c.alpha / norm, x_t) - scale(c.sigma / norm, pred)

    def noise(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Eps = (sigma x_t + alpha v) / (alpha^2 + sigma^2)."""
        norm = c.alpha**2 + c.sigma**2
        return scale(c.sigma / norm, x_t) + scale(c.alpha / norm, pred)

    def score(self, pred: State, x_t: State, c: Coefficients) -> State:
        """Score = -eps / sigma; infinite at t = 0."""
        return scale(-1 / c.sigma, self.noise(pred, x_t, c))

    def read(self, source: Parametrization, pred: State, x_t: State, c: Coefficients) -> State:
        """The angular velocity that another parametrization's prediction stands for."""
        return scale(c.alpha, source.noise(pred, x_t, c)) - scale(c.sigma, source.data(pred, x_t, c))
