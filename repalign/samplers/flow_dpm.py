"""DPM-Solver++ of second order for flows, as Stable Diffusion 3 uses it."""

from __future__ import annotations

import math
from collections.abc import Callable

from repalign.protocols import Field, Randomness
from repalign.samplers.field import predict
from repalign.samplers.grid import field_grid, initial_state
from repalign.state import State


class FlowDPMSolver2M:
    """x <- (sigma'/sigma) x + (1 - e^-h) D with h = log sigma - log sigma', one call a step (DPM-Solver++, 2M).

    D is the estimate of x_0, extrapolated over two steps: (1 + 1/(2r)) x_0(now) - 1/(2r) x_0(before), r the ratio of
    the last h to this one. The first step and the one to sigma = 0 are of first order. For straight paths, alpha = 1 -
    sigma: the step is then exact where x_0 does not change. Source: arXiv:2211.01095, algorithm 2, with the variable
    -log sigma that the sampler ``dpmpp_2m`` of Stable Diffusion 3's code takes for flows (the log-SNR is another one).

    Args:
        steps, start, end, shift, last_step_size, dtype, skip: as for :class:`repalign.samplers.euler.Euler`.
    """

    def __init__(
        self,
        steps: int = 50,
        start: float | None = None,
        end: float | None = None,
        shift: float = 1.0,
        last_step_size: float | None = None,
        dtype: str = "float32",
        skip: int = 0,
    ) -> None:
        self.steps = steps
        self.start = start
        self.end = end
        self.shift = shift
        self.last_step_size = last_step_size
        self.dtype = dtype
        self.skip = skip

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Integrate from noise to data; deterministic, so ``random`` is not read. ``trace`` sees every new state."""
        times = field_grid(field, self.steps, self.start, self.end, self.shift, self.last_step_size, self.skip)
        sigmas = field.path.coefficients(times).sigma.tolist()
        x = initial_state(x_1, self.dtype)
        before: State | None = None
        h_before = 0.0
        for t, sigma, sigma_next in zip(times[:-1], sigmas[:-1], sigmas[1:], strict=True):
            pred, c = predict(field, x, t)
            x_0 = field.parametrization.data(pred, x, c)
            h = math.inf if sigma_next == 0 else math.log(sigma) - math.log(sigma_next)
            estimate = x_0
            if before is not None and sigma_next != 0:
                half = h / (2 * h_before)  # 1 / (2r)
                estimate = (1 + half) * x_0 - half * before
            x = sigma_next / sigma * x - math.expm1(-h) * estimate
            before, h_before = x_0, h
            if trace is not None:
                trace(x)
        return x
