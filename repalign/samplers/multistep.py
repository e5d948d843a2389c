"""Linear multistep (Adams-like) integration of the probability-flow ODE: several slopes, one call a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.protocols import Field, Randomness
from repalign.samplers.field import velocity
from repalign.samplers.grid import field_grid, initial_state
from repalign.state import Coefficients, State

MAX_ORDER = 4


class LinearMultistep:
    """x <- x + (t_next - t) sum_j c_j v_j over the last ``order`` slopes, one call a step.

    c_j are the integrals over [t, t_next] of the Lagrange polynomials through the times of the slopes, over their sum
    (:func:`multistep_weights`). The error of a step is of order ``order`` + 1; the first steps have fewer slopes, and
    the very first is Euler's, so that the whole is of second order at most unless the field is flat near the noise. On
    a uniform grid order 2 is Adams-Bashforth's (-1/2, 3/2). A guided field's slopes are kept guided. Source: DDT
    (arXiv:2504.05741), the few-step sampler of its code. Deviation: the times are those of the grid; the official code
    adds up its steps in float32.

    Args:
        steps: number of steps.
        order: number of slopes, 1 (Euler) to 4.
        basis: in which variable the slopes are interpolated: ``time``; ``snr``, alpha/sigma, for grids that end before
            the data; ``log_snr``, its logarithm.
        start, end, shift, last_step_size, dtype: as for :class:`repalign.samplers.euler.Euler`.

    Raises:
        UserError: for an order that is none, an unknown basis, or basis ``snr`` on a grid that ends at t = 0, where the
            ratio is infinite and the weights would be of the order of 1e6.
    """

    def __init__(
        self,
        steps: int = 10,
        order: int = 2,
        basis: str = "time",
        start: float | None = None,
        end: float | None = None,
        shift: float = 1.0,
        last_step_size: float | None = None,
        dtype: str = "float32",
    ) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise UserError(f"sampler.order: expected 1 to {MAX_ORDER}, found {order}")
        if basis not in BASES:
            raise unknown_choice("sampler.basis", basis, BASES, "basis")
        self.steps = steps
        self.order = order
        self.basis = basis
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
        if self.basis == "snr" and times[-1] == 0:
            raise UserError("sampler.basis: snr is infinite at t = 0; set sampler.end above 0, or basis=log_snr")
        nodes = BASES[self.basis](times, field.path.coefficients(times))
        weights = multistep_weights(nodes, self.order)
        x = initial_state(x_1, self.dtype)
        slopes: list[State] = []
        for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
            slopes = [*slopes, velocity(field, x, t)][-self.order :]
            terms = [w * v for w, v in zip(weights[i, -len(slopes) :], slopes, strict=True)]
            x = x + (t_next - t) * sum(terms[1:], terms[0])
            if trace is not None:
                trace(x)
        return x


def multistep_weights(nodes: Float[Tensor, " n"], order: int) -> Float[Tensor, "steps order"]:
    """Normalised integrals over every interval of the grid of the Lagrange basis through the last times.

    Args:
        nodes: the grid's times, or a monotone function of them, [steps + 1].
        order: number k of times; step i has min(k, i + 1).

    Returns:
        [steps, order]: row i holds the weights of the slopes at nodes i - k + 1 .. i, the newest last, zeros before.
        In the dtype of the nodes.
    """
    weights = nodes.new_zeros(len(nodes) - 1, order)
    for i in range(len(nodes) - 1):
        known = nodes[max(0, i + 1 - order) : i + 1]
        integrals = torch.stack([_lagrange_integral(known, j, nodes[i], nodes[i + 1]) for j in range(len(known))])
        weights[i, order - len(known) :] = integrals / integrals.sum()
    return weights


def _lagrange_integral(known: Tensor, j: int, low: Tensor, high: Tensor) -> Tensor:
    """The integral of prod_m (x - n_m) / (n_j - n_m) over [low, high], m other than j: exact, as a polynomial.

    Expanded around one of the other nodes, which for two of them is ((high - n)^2 - (low - n)^2) / 2.
    """
    others = torch.cat([known[:j], known[j + 1 :]])
    origin = others[0] if len(others) else low
    powers = [torch.ones_like(low)]  # of y = x - origin, ascending
    for node in others:
        shifted, offset = [torch.zeros_like(low), *powers], origin - node
        powers = [y + offset * p for y, p in zip(shifted, [*powers, torch.zeros_like(low)], strict=True)]

    def antiderivative(y: Tensor) -> Tensor:
        return torch.stack([p * y ** (k + 1) / (k + 1) for k, p in enumerate(powers)]).sum()

    area = antiderivative(high - origin) - antiderivative(low - origin)
    return area / torch.prod(known[j] - others)


def _time(t: Tensor, c: Coefficients) -> Tensor:
    return t


def _snr(t: Tensor, c: Coefficients) -> Tensor:
    return c.alpha.clamp(min=1e-8) / (c.sigma + 1e-8)


def _log_snr(t: Tensor, c: Coefficients) -> Tensor:
    return (c.alpha.clamp(min=1e-3) / (c.sigma + 1e-3)).log()


BASES: Mapping[str, Callable[[Tensor, Coefficients], Tensor]] = {"time": _time, "snr": _snr, "log_snr": _log_snr}
