"""Pseudo linear multistep sampling of a discrete chain."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from repalign.paths.interpolant import scale
from repalign.protocols import Field, Randomness
from repalign.samplers.ddim import BeforeStep, ImplicitSteps, ddim_steps, implicit_step
from repalign.samplers.ddpm import discrete_path
from repalign.samplers.field import predict
from repalign.samplers.grid import initial_state
from repalign.state import State

# Adams-Bashforth weights of the newest noise first, for two, three and four of them.
WEIGHTS = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class PLMS:
    """DDIM's deterministic step with a noise extrapolated from up to four predictions (PNDM, arXiv:2202.09778).

    The first step is Heun's: the mean of the noise here and of that after a whole DDIM step. Then (3 e - e_1) / 2,
    (23 e - 16 e_1 + 5 e_2) / 12 and (55 e - 59 e_1 + 37 e_2 - 9 e_3) / 24 with the predictions of earlier steps, not
    the extrapolated ones. steps + 1 calls of the field. As LDM runs it with ``steps: ldm50`` and ``end: first_step``.

    Args:
        steps, end, dtype: as for :class:`repalign.samplers.ddim.DDIM`.

    Raises:
        UserError: when the path is not discrete, or the steps are none.
    """

    def __init__(self, steps: str | int = "ldm50", end: str = "first_step", dtype: str = "float32") -> None:
        self.steps = steps
        self.end = end
        self.dtype = dtype

    def __call__(
        self,
        field: Field,
        x_1: State,
        random: Randomness,
        *,
        trace: Callable[[State], None] | None = None,
        trace_x_0: Callable[[State], None] | None = None,
        before_step: BeforeStep | None = None,
    ) -> State:
        """Run the chain; deterministic, so ``random`` is read by ``before_step`` alone. See :class:`DDIM`."""
        steps = ddim_steps(discrete_path(field), self.steps, 0.0, self.end)
        x = initial_state(x_1, self.dtype)
        history: list[State] = []  # newest first
        for j, index in enumerate(reversed(range(len(steps)))):
            t = steps.times[index]
            if before_step is not None:
                x = before_step(x, t, random.at(j))
            eps = _noise(field, x, t)
            if history:
                terms = [w * e for w, e in zip(WEIGHTS[len(history) - 1], [eps, *history], strict=True)]
                mean = sum(terms[1:], terms[0])
            else:
                ahead = _lead(steps, index, x, eps)[1]
                mean = (eps + _noise(field, ahead, steps.times[max(index - 1, 0)])) / 2
            x_0, x = _lead(steps, index, x, mean)
            history = [eps, *history][:3]
            if trace_x_0 is not None:
                trace_x_0(x_0)
            if trace is not None:
                trace(x)
        return x


def _noise(field: Field, x: State, t: Tensor) -> State:
    pred, c = predict(field, x, t)
    return field.parametrization.noise(pred, x, c)


def _lead(steps: ImplicitSteps, index: int, x: State, eps: State) -> tuple[State, State]:
    """The estimate of x_0 and the earlier state that a noise leads to."""
    _, now, before, spread = steps.at(index)
    x_0 = scale(1 / now.sqrt(), x - scale((1 - now).sqrt(), eps))
    return x_0, implicit_step(x_0, eps, before, spread)
