"""Heun's method on the reverse SDE, with slopes that are kept from step to step (DDT)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from repalign.paths.interval import time_interval
from repalign.protocols import Field, Randomness
from repalign.samplers.diffusion import Diffusion, diffusion_form
from repalign.samplers.field import predict
from repalign.samplers.grid import initial_state, time_grid
from repalign.state import State


class StochasticHeun:
    """dx = (v - w s) dt + sqrt(2 w) dW by the mean of velocity v and score s at both ends of a step.

    x' = x + (v - w s) dt + sqrt(2 w |dt|) n, dt < 0, then x <- x + ((v + v')/2 - w (s + s')/2) dt + sqrt(2 w |dt|) n
    with v', s' at x' and the end of the step, w that of its beginning and one n for both; the last step is Euler's for
    the ODE. Of second order in the drift where w is constant, of first order in the noise. Whether a step is guided is
    decided at its beginning. Source: the Heun sampler of DDT's code (arXiv:2504.05741) with its steps ``sde``,
    ``sde_preserve`` (diffusion :class:`repalign.samplers.diffusion.Sigma` of norm 0.5) and ``sde_mean``; with no
    diffusion it is :class:`repalign.samplers.heun.Heun`. SiT's stochastic Heun, which adds the noise first, is a method
    of :class:`repalign.samplers.euler_maruyama.EulerMaruyama`.

    Not compared with numbers of the official code, of which only the step without diffusion was at hand.

    Args:
        steps: number of steps, the last one included.
        diffusion: w_t, an object of :mod:`repalign.samplers.diffusion` or its name there.
        noise: false leaves sqrt(2 w |dt|) n out (``sde_mean``).
        reuse_slope: take v', s' for the next step's v, s, so that a step costs one call (DDT's mode when not exact).
        last_step_size: where the last step begins, before the shift.
        start: end of the grid at the noise; None for that of :func:`repalign.paths.interval.time_interval`.
        shift: of the grid, s > 1 spends more steps near the noise.
        dtype: of the trajectory, float32 or float64.

    Raises:
        UserError: for an unknown diffusion.
    """

    def __init__(
        self,
        steps: int = 250,
        diffusion: Diffusion | str = "sigma",
        noise: bool = True,
        reuse_slope: bool = False,
        last_step_size: float = 0.04,
        start: float | None = None,
        shift: float = 1.0,
        dtype: str = "float32",
    ) -> None:
        self.steps = steps
        self.diffusion = diffusion_form(diffusion) if isinstance(diffusion, str) else diffusion
        self.noise = noise
        self.reuse_slope = reuse_slope
        self.last_step_size = last_step_size
        self.start = start
        self.shift = shift
        self.dtype = dtype

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Integrate; step i reads the stream ``noise`` of stage i. ``trace`` sees every new state, ``steps`` in all."""
        safe = time_interval(field.path, field.parametrization, last_step_size=self.last_step_size)
        start = safe.high if self.start is None else self.start
        times = time_grid(start, 0.0, self.steps, self.shift, self.last_step_size)
        x = initial_state(x_1, self.dtype)
        kept: tuple[State, State] | None = None
        for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
            step, dt = field.during(t), t_next - t
            v, s = _slopes(step, x, t) if kept is None else kept
            if i == self.steps - 1:
                x = x + dt * v
            else:
                w = self.diffusion(t, field.path.coefficients(t))
                kick = (2 * w * -dt).sqrt() * random.at(i).normal_like("noise", x) if self.noise else 0.0
                predicted = x + dt * (v - w * s) + kick
                v_next, s_next = _slopes(step, predicted, t_next)
                x = x + 0.5 * dt * (v + v_next - w * (s + s_next)) + kick
                kept = (v_next, s_next) if self.reuse_slope else None
            if trace is not None:
                trace(x)
        return x


def _slopes(field: Field, x: State, t: Tensor) -> tuple[State, State]:
    """Velocity and score, read off one call of the field."""
    pred, c = predict(field, x, t)
    return field.parametrization.velocity(pred, x, c), field.parametrization.score(pred, x, c)
