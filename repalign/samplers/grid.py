"""Time grids and the few checks that samplers share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.paths.time import shift_time
from repalign.state import State, map_state

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def time_grid(start: float, end: float, steps: int, shift: float = 1.0) -> Float[Tensor, " n"]:
    """Times of ``steps`` steps from ``start`` (noise) down to ``end`` (data), [steps + 1], float64.

    Uniform, then shifted by :func:`repalign.paths.time.shift_time`, which leaves the ends 1 and 0 where they are.

    Raises:
        UserError: when there is no step, the ends are not 0 <= end < start <= 1, or the shift is not positive.
    """
    if steps < 1:
        raise UserError(f"sampler.steps must be at least 1, found {steps}")
    if not 0 <= end < start <= 1:
        raise UserError(f"sampler: expected 0 <= end < start <= 1, found start={start}, end={end}")
    if shift <= 0:
        raise UserError(f"sampler.shift must be positive, found {shift}")
    return shift_time(torch.linspace(start, end, steps + 1, dtype=torch.float64), shift)


def initial_state(x_1: State, dtype: str) -> State:
    """The noise in the dtype of the trajectory.

    Raises:
        UserError: when ``dtype`` is neither float32 nor float64.
    """
    if dtype not in DTYPES:
        raise unknown_choice("sampler.dtype", dtype, DTYPES, "dtype")
    return map_state(lambda x: x.to(DTYPES[dtype]), x_1)
