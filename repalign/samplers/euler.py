"""Euler's method for the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable

from repalign.protocols import Field, Randomness
from repalign.samplers.field import velocity
from repalign.samplers.grid import field_grid, initial_state
from repalign.state import State


class Euler:
    """x <- x + (t_next - t) v(x, t) over a grid of ``steps`` steps: one call of the field each.

    Args:
        steps: number of steps.
        start, end: ends of the grid; None for those of :func:`repalign.paths.interval.time_interval` (1 and 0 for a
            velocity on the linear or trigonometric path).
        shift: of the grid, s > 1 spends more steps near the noise (SD3).
        last_step_size: where the last step begins, before the shift; None for a uniform grid (DDT: 0.04).
        dtype: of the trajectory, float32 or float64 (REPA).
        skip: leave out the first steps of the grid; the given state is then one at the time where the rest begins
            (image to image).

    SiT counts grid points: its ``num_steps`` S is ``steps = S - 1`` here; REPA counts steps as we do.
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
        x = initial_state(x_1, self.dtype)
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            x = x + (t_next - t) * velocity(field, x, t)
            if trace is not None:
                trace(x)
        return x
