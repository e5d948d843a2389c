"""Solvers of torchdiffeq for the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from repalign.errors import UserError, unknown_choice
from repalign.paths.interval import time_interval
from repalign.protocols import Field, Randomness
from repalign.samplers.field import velocity
from repalign.samplers.grid import initial_state, time_grid
from repalign.state import State, Streams, leading

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


class Adaptive:
    """dx/dt = v(x, t) from noise to data by a torchdiffeq method; SiT's ODE sampler with its default ``dopri5``.

    An adaptive method chooses its steps by the error over the whole batch: this is the one sampler here whose result
    for a sample depends, within the tolerances, on the other samples.

    Args:
        method: an adaptive method, or a fixed one, which then needs ``steps``.
        atol, rtol: tolerances of an adaptive method.
        steps: number of steps of a fixed method.
        start, end: ends of the integration; None for those of :func:`repalign.paths.interval.time_interval`.
        dtype: of the trajectory, float32 or float64.

    Deviation: SiT's adaptive runs may step past the end and interpolate back; here the last step ends at ``end``.

    Raises:
        UserError: for an unknown method, or steps missing or given where they have no meaning.
    """

    def __init__(
        self,
        method: str = "dopri5",
        atol: float = 1e-6,
        rtol: float = 1e-3,
        steps: int | None = None,
        start: float | None = None,
        end: float | None = None,
        dtype: str = "float32",
    ) -> None:
        if method not in ADAPTIVE + FIXED:
            raise unknown_choice("sampler.method", method, ADAPTIVE + FIXED, "torchdiffeq method")
        if method in FIXED and steps is None:
            raise UserError(f"sampler.steps: the fixed method '{method}' needs a number of steps, found none")
        if method in ADAPTIVE and steps is not None:
            raise UserError(
                f"sampler.steps: the adaptive method '{method}' chooses its steps, found {steps}; remove it"
            )
        self.method = method
        self.atol = atol
        self.rtol = rtol
        self.steps = steps
        self.start = start
        self.end = end
        self.dtype = dtype

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Integrate; deterministic. ``trace`` sees every state of a fixed method, the last of an adaptive one."""
        x = initial_state(x_1, self.dtype)
        names = list(x) if isinstance(x, Streams) else None

        def pack(state: State) -> tuple[Tensor, ...]:
            return tuple(state.values()) if isinstance(state, Streams) else (state,)

        def unpack(tensors: tuple[Tensor, ...]) -> State:
            return tensors[0] if names is None else Streams(dict(zip(names, tensors, strict=True)))

        def slope(t: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return pack(velocity(field, unpack(tensors), t))

        safe = time_interval(field.path, field.parametrization)
        start = safe.high if self.start is None else self.start
        end = safe.low if self.end is None else self.end
        times = time_grid(start, end, self.steps or 1).to(leading(x))
        options: Mapping[str, Any] = {"step_t": times[-1:]} if self.method in ADAPTIVE else {}
        grid = odeint(slope, pack(x), times, atol=self.atol, rtol=self.rtol, method=self.method, options=dict(options))
        assert isinstance(grid, tuple) and isinstance(grid[0], torch.Tensor)
        for i in range(1, len(times)):
            x = unpack(tuple(tensor[i] for tensor in grid))
            if trace is not None:
                trace(x)
        return x
