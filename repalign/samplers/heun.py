"""Heun's method for the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable

from repalign.protocols import Field, Randomness
from repalign.samplers.field import velocity
from repalign.samplers.grid import field_grid, initial_state
from repalign.state import State


class Heun:
    """Explicit trapezoid: an Euler step, then the mean of the slopes at both ends; two calls of the field each.

    Whether a step is guided is decided by the time at its start, for both calls (REPA).

    Args:
        steps: number of steps.
        correct_last: also correct the last step. True is torchdiffeq's ``heun2`` (SiT); False is REPA's and EDM's,
            which end on an Euler step and never call the field at the data end.
        reuse_slope: take the second slope of a step for the first of the next, so that a step costs one call: DDT's
            mode when not ``exact``. Of second order still.
        start, end, shift, last_step_size, dtype: as for :class:`repalign.samplers.euler.Euler`.
    """

    def __init__(
        self,
        steps: int = 25,
        correct_last: bool = True,
        reuse_slope: bool = False,
        start: float | None = None,
        end: float | None = None,
        shift: float = 1.0,
        last_step_size: float | None = None,
        dtype: str = "float32",
    ) -> None:
        self.steps = steps
        self.correct_last = correct_last
        self.reuse_slope = reuse_slope
        self.start = start
        self.end = end
        self.shift = shift
        self.last_step_size = last_step_size
        self.dtype = dtype

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Integrate from noise to data; deterministic, so ``random`` is not read. ``trace`` sees every new state."""
        times = field_grid(field, self.steps, self.start, self.end, self.shift, self.last_step_size)
        x = initial_state(x_1, self.dtype)
        kept: State | None = None
        for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
            step = field.during(t)
            slope = velocity(step, x, t) if kept is None else kept
            if self.correct_last or i < self.steps - 1:
                end_slope = velocity(step, x + (t_next - t) * slope, t_next)
                kept = end_slope if self.reuse_slope else None
                slope = 0.5 * (slope + end_slope)
            x = x + (t_next - t) * slope
            if trace is not None:
                trace(x)
        return x
