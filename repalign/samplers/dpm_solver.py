"""DPM-Solver++: multistep integration in the logarithm of the signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.paths.interpolant import scale
from repalign.paths.vp import DiscreteVPPath
from repalign.protocols import Field, Randomness
from repalign.samplers.ddpm import discrete_path, estimate_x_0
from repalign.samplers.grid import field_grid, initial_state
from repalign.state import State

MAX_ORDER = 3
SHORT = 15  # with fewer steps the last ones are of lower order


class DPMSolverPlusPlus:
    """DPM-Solver++(2M) in the data prediction (arXiv:2211.01095, algorithm 2); one call of the field a step.

    With lambda = log(alpha / sigma), h = lambda_next - lambda and the estimates m_0, m_1 of x_0 here and one step ago:
    x_next = (sigma_next / sigma) x - alpha_next (e^{-h} - 1) (m_0 + D_1 / 2), D_1 = (m_0 - m_1) / r, r = h_before / h.
    The first step, and a step that ends at the data, have no D_1. Order 3 adds the second difference as diffusers'
    ``DPMSolverMultistepScheduler`` does; its grids and its rule for the last steps are kept too. Works on every path.

    Args:
        steps: number of steps.
        order: 1 (DDIM), 2 (2M) or 3.
        spacing: of the steps of a discrete chain, ``leading``, ``linspace`` or ``trailing`` in diffusers' words; or
            ``time``, uniform in time, which other paths need.
        offset: added to the steps of ``leading`` (Stable Diffusion: 1).
        end: where the last step leads: ``data``, or ``first_step``, the chain's least noise.
        lower_order_last: with fewer than 15 steps the last is of order 1 and the one before of order 2 at most.
        shift: of ``time`` grids, see :func:`repalign.samplers.grid.time_grid`.
        dtype: of the trajectory, float32 or float64.

    Raises:
        UserError: for an unknown order, spacing or end, or a spacing of steps on a path that is not discrete.
    """

    def __init__(
        self,
        steps: int = 20,
        order: int = 2,
        spacing: str = "leading",
        offset: int = 1,
        end: str = "data",
        lower_order_last: bool = True,
        shift: float = 1.0,
        dtype: str = "float32",
    ) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise UserError(f"sampler.order: expected 1 to {MAX_ORDER}, found {order}")
        if spacing not in (*SPACINGS, "time"):
            raise unknown_choice("sampler.spacing", spacing, (*SPACINGS, "time"), "spacing")
        if end not in ("data", "first_step"):
            raise unknown_choice("sampler.end", end, ("data", "first_step"), "end")
        if steps < 1:
            raise UserError(f"sampler.steps must be at least 1, found {steps}")
        self.steps = steps
        self.order = order
        self.spacing = spacing
        self.offset = offset
        self.end = end
        self.lower_order_last = lower_order_last
        self.shift = shift
        self.dtype = dtype

    def times(self, field: Field) -> Float[Tensor, " n"]:
        """Times of the calls and, last, where the trajectory ends; float64."""
        if self.spacing == "time":
            return field_grid(field, self.steps, None, None, self.shift)
        path = discrete_path(field)
        chosen = chain_steps(path, self.steps, self.spacing, self.offset)
        end = 0.0 if self.end == "data" else 1 / path.steps
        return torch.cat([(chosen + 1).double() / path.steps, torch.tensor([end], dtype=torch.float64)])

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Integrate from noise to data; deterministic, so ``random`` is not read. ``trace`` sees every new state."""
        times = self.times(field)
        c = field.path.coefficients(times)
        log_ratio = c.alpha.log() - c.sigma.log()
        x = initial_state(x_1, self.dtype)
        estimates: list[State] = []  # newest first
        for i, t in enumerate(times[:-1]):
            estimates = [estimate_x_0(field, field(x, t), x, t, clip=False), *estimates][:MAX_ORDER]
            known = log_ratio[max(0, i + 1 - self.order_at(i, bool(c.sigma[i + 1] > 0))) : i + 2].flip(0)
            mean = extrapolated(estimates, known)
            decay = torch.expm1(-(known[0] - known[1]))
            x = scale(c.sigma[i + 1] / c.sigma[i], x) - scale(c.alpha[i + 1] * decay, mean)
            if trace is not None:
                trace(x)
        return x

    def order_at(self, step: int, noisy_end: bool) -> int:
        """Order of a step; ``noisy_end`` says whether it leads to a state that still has noise."""
        left = self.steps - 1 - step  # steps after this one
        cautious = self.lower_order_last and self.steps < SHORT
        if left == 0 and (cautious or not noisy_end):
            return 1
        limit = 2 if left == 1 and cautious else MAX_ORDER
        return min(self.order, limit, step + 1)


def extrapolated(estimates: list[State], log_ratios: Float[Tensor, " k"]) -> State:
    """The mean estimate of x_0 over a step, weighted as the exact solution weighs it.

    Args:
        estimates: of x_0, the newest first; as many are used as ``log_ratios`` has intervals.
        log_ratios: lambda where the step leads, where it begins, and at the calls before, [2] to [4].
    """
    h = log_ratios[0] - log_ratios[1]
    m_0 = estimates[0]
    if len(log_ratios) == 2:
        return m_0
    r_0 = (log_ratios[1] - log_ratios[2]) / h
    first = (1 / r_0) * (m_0 - estimates[1])
    if len(log_ratios) == 3:
        return m_0 + 0.5 * first
    r_1 = (log_ratios[2] - log_ratios[3]) / h
    older = (1 / r_1) * (estimates[1] - estimates[2])
    slope = first + (r_0 / (r_0 + r_1)) * (first - older)
    curve = (1 / (r_0 + r_1)) * (first - older)
    decay = torch.expm1(-h)
    return m_0 - ((decay / h + 1) / decay) * slope + (((decay + h) / h**2 - 0.5) / decay) * curve


def chain_steps(path: DiscreteVPPath, count: int, spacing: str, offset: int) -> Float[Tensor, " n"]:
    """Steps of the whole chain at which the field is called, from noise to data, [count].

    Raises:
        UserError: when the chain has fewer steps.
    """
    if count >= path.steps:
        raise UserError(f"sampler.steps: expected fewer than the chain's {path.steps}, found {count}")
    return SPACINGS[spacing](path.steps, count, offset)


def _leading(whole: int, count: int, offset: int) -> Tensor:
    return torch.arange(count, 0, -1) * (whole // (count + 1)) + offset


def _linspace(whole: int, count: int, offset: int) -> Tensor:
    return torch.linspace(0, whole - 1, count + 1, dtype=torch.float64).round().flip(0)[:-1].long()


def _trailing(whole: int, count: int, offset: int) -> Tensor:
    return (whole - torch.arange(count, dtype=torch.float64) * whole / count).round().long() - 1


SPACINGS: Mapping[str, Callable[[int, int, int], Tensor]] = {
    "leading": _leading,
    "linspace": _linspace,
    "trailing": _trailing,
}
