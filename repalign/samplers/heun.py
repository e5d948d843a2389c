"""Heun's method for the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable

from repalign.paths.interval import time_interval
from repalign.protocols import Field, Randomness
from repalign.samplers.field import velocity
from repalign.samplers.grid import initial_state, time_grid
from repalign.state import State


class Heun:
    """Explicit trapezoid: an Euler step, then the mean of the slopes at both ends; two calls of the field each.

    Whether a step is guided is decided by the time at its start, for both calls (REPA).

    Args:
        steps: number of steps.
        correct_last: also correct the last step. True is torchdiffeq's ``heun2`` (SiT); False is REPA's and EDM's,
            which end on an Euler step and never call the field at the data end.
        start, end, shift, dtype: as for :class:`repalign.samplers.euler.Euler`.
    """

    def __init__(
        self,
        steps: int = 25,
        correct_last: bool = True,
        start: float | None = None,
        end: float | None = None,
        shift: float = 1.0,
        dtype: str = "float32",
    ) -> None:
        self.steps = steps
        self.correct_last = correct_last
        self.start = start
        self.end = end
        self.shift = shift
        self.dtype = dtype

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Integrate from noise to data; deterministic, so ``random`` is not read. ``trace`` sees every new state."""
        safe = time_interval(field.path, field.parametrization)
        start = safe.high if self.start is None else self.start
        end = safe.low if self.end is None else self.end
        times = time_grid(start, end, self.steps, self.shift)
        x = initial_state(x_1, self.dtype)
        for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
            step = field.during(t)
            slope = velocity(step, x, t)
            if self.correct_last or i < self.steps - 1:
                slope = 0.5 * (slope + velocity(step, x + (t_next - t) * slope, t_next))
            x = x + (t_next - t) * slope
            if trace is not None:
                trace(x)
        return x
