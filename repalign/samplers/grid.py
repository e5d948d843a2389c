"""Time grids and the few checks that samplers share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.paths.interval import time_interval
from repalign.paths.time import shift_time
from repalign.protocols import Field
from repalign.state import State, map_state

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def time_grid(
    start: float, end: float, steps: int, shift: float = 1.0, last_step_size: float | None = None
) -> Float[Tensor, " n"]:
    """Times of ``steps`` steps from ``start`` (noise) down to ``end`` (data), [steps + 1], float64.

    Uniform, or, with ``last_step_size``, uniform over steps - 1 steps from ``start`` to end + last_step_size and then
    one step to ``end`` (DDT). Then shifted by :func:`repalign.paths.time.shift_time`, which leaves the ends 1 and 0
    where they are; the last step is shifted with the rest.

    Raises:
        UserError: when there is no step, the ends are not 0 <= end < start <= 1, the last step does not fit between
            them, or the shift is not positive.
    """
    if steps < 1:
        raise UserError(f"sampler.steps must be at least 1, found {steps}")
    if not 0 <= end < start <= 1:
        raise UserError(f"sampler: expected 0 <= end < start <= 1, found start={start}, end={end}")
    if shift <= 0:
        raise UserError(f"sampler.shift must be positive, found {shift}")
    if last_step_size is None:
        return shift_time(torch.linspace(start, end, steps + 1, dtype=torch.float64), shift)
    if not 0 < last_step_size < start - end:
        raise UserError(
            f"sampler.last_step_size: expected between 0 and start - end = {start - end}, found {last_step_size}"
        )
    times = torch.linspace(start, end + last_step_size, steps, dtype=torch.float64)
    return shift_time(torch.cat([times, times.new_tensor([end])]), shift)


def field_grid(
    field: Field,
    steps: int,
    start: float | None,
    end: float | None,
    shift: float = 1.0,
    last_step_size: float | None = None,
    skip: int = 0,
) -> Float[Tensor, " n"]:
    """:func:`time_grid` whose missing ends are those of :func:`repalign.paths.interval.time_interval` for the field.

    The first ``skip`` steps are left out.

    Raises:
        UserError: when no step is left; and as :func:`time_grid`.
    """
    if not 0 <= skip < steps:
        raise UserError(f"sampler.skip: expected 0 to {steps - 1} (sampler.steps={steps}), found {skip}")
    safe = time_interval(field.path, field.parametrization)
    start, end = safe.high if start is None else start, safe.low if end is None else end
    return time_grid(start, end, steps, shift, last_step_size)[skip:]


def initial_state(x_1: State, dtype: str) -> State:
    """The noise in the dtype of the trajectory.

    Raises:
        UserError: when ``dtype`` is neither float32 nor float64.
    """
    if dtype not in DTYPES:
        raise unknown_choice("sampler.dtype", dtype, DTYPES, "dtype")
    return map_state(lambda x: x.to(DTYPES[dtype]), x_1)
