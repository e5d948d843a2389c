"""Stochastic sampling: the reverse SDE of SiT and REPA."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.paths.interval import time_interval
from repalign.protocols import Field, Randomness
from repalign.samplers.diffusion import Diffusion, diffusion_form
from repalign.samplers.field import predict, velocity
from repalign.samplers.grid import initial_state, time_grid
from repalign.state import State

Time = Float[Tensor, ""]


class EulerMaruyama:
    """Integrates dx = (v - w s) dt + sqrt(2 w) dW from t = 1 to ``last_step_size``, then one step without noise.

    v is the velocity, s the score, both read off one call of the field. The ``steps`` calls of the Euler method are
    steps - 1 stochastic steps on a uniform grid, x <- x + (v - w s) dt + sqrt(2 w |dt|) n with dt < 0, and the last
    step. SiT's SDE (its ``num_steps`` is ``steps``) and REPA's (diffusion ``linear``, dtype float64) are this class, so
    are DDT's three steps: ``sde`` (diffusion ``sigma``), ``sde_preserve`` (half of it) and ``sde_mean`` (method
    ``mean``), all with the last step ``euler``.

    Args:
        steps: number of states after the noise, the last step included.
        diffusion: w_t, an object of :mod:`repalign.samplers.diffusion` or its name there.
        last_step: from t = last_step_size to the data: ``mean`` (the SDE without its noise), ``euler`` (the ODE),
            ``tweedie`` (the denoised estimate of x_0), ``none`` (no such step: the grid goes to the end).
        last_step_size: where the grid ends, before the shift; not used by ``none``.
        method: ``euler``; ``heun``: SiT's predictor-corrector with the noise added first, two calls a step; ``mean``:
            the drift v - w s of Euler's step without its noise, which narrows the distribution (DDT).
        start, end: ends of the grid; None for those of :func:`repalign.paths.interval.time_interval`. ``end`` counts
            without a last step only.
        shift: of the grid, the last step included; s > 1 spends more steps near the noise.
        dtype: of the trajectory, float32 or float64.

    Raises:
        UserError: for an unknown diffusion, last step or method, fewer than two steps, or a Heun grid that ends at 0.
    """

    def __init__(
        self,
        steps: int = 250,
        diffusion: Diffusion | str = "sigma",
        last_step: str = "mean",
        last_step_size: float = 0.04,
        method: str = "euler",
        start: float | None = None,
        end: float | None = None,
        shift: float = 1.0,
        dtype: str = "float32",
    ) -> None:
        if steps < 2:
            raise UserError(f"sampler.steps must be at least 2 for an SDE, found {steps}")
        if last_step not in LAST_STEPS:
            raise unknown_choice("sampler.last_step", last_step, LAST_STEPS, "last step")
        if method not in METHODS:
            raise unknown_choice("sampler.method", method, METHODS, "method")
        self.steps = steps
        self.diffusion = diffusion_form(diffusion) if isinstance(diffusion, str) else diffusion
        self.last_step = last_step
        self.last_step_size = 0.0 if last_step == "none" else last_step_size
        self.method = method
        self.start = start
        self.end = end
        self.shift = shift
        self.dtype = dtype

    def __call__(
        self, field: Field, x_1: State, random: Randomness, *, trace: Callable[[State], None] | None = None
    ) -> State:
        """Integrate; step i reads the stream ``noise`` of stage i. ``trace`` sees every new state, ``steps`` in all."""
        safe = time_interval(field.path, field.parametrization, last_step_size=self.last_step_size)
        start = safe.high if self.start is None else self.start
        end = self.last_step_size if self.last_step_size > 0 else (safe.low if self.end is None else self.end)
        if self.method == "heun" and end == 0:
            raise UserError(
                "sampler: heun needs the score at its end, infinite at t = 0; set a last step or sampler.end"
            )
        times = time_grid(start, end, self.steps - 1, self.shift)
        stochastic_step = METHODS[self.method]
        x = initial_state(x_1, self.dtype)
        for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
            noise = random.at(i).normal_like("noise", x)
            x = stochastic_step(field.during(t), self.diffusion, x, t, t_next, noise)
            if trace is not None:
                trace(x)
        x = LAST_STEPS[self.last_step](field, self.diffusion, x, times[-1])
        if trace is not None:
            trace(x)
        return x


def _drift(field: Field, diffusion: Diffusion, x: State, t: Time) -> State:
    """The drift v - w s."""
    pred, c = predict(field, x, t)
    v, s = field.parametrization.velocity(pred, x, c), field.parametrization.score(pred, x, c)
    return v - diffusion(t, c) * s


def _kick(field: Field, diffusion: Diffusion, t: Time, t_next: Time, noise: State) -> State:
    """The noise sqrt(2 w |dt|) n of a step."""
    w = diffusion(t, field.path.coefficients(t))
    return (2 * w * (t - t_next)).sqrt() * noise


def _euler_step(field: Field, diffusion: Diffusion, x: State, t: Time, t_next: Time, noise: State) -> State:
    return x + (t_next - t) * _drift(field, diffusion, x, t) + _kick(field, diffusion, t, t_next, noise)


def _heun_step(field: Field, diffusion: Diffusion, x: State, t: Time, t_next: Time, noise: State) -> State:
    kicked = x + _kick(field, diffusion, t, t_next, noise)
    slope = _drift(field, diffusion, kicked, t)
    end_slope = _drift(field, diffusion, kicked + (t_next - t) * slope, t_next)
    return kicked + 0.5 * (t_next - t) * (slope + end_slope)


def _mean_step(field: Field, diffusion: Diffusion, x: State, t: Time, t_next: Time, noise: State) -> State:
    return x + (t_next - t) * _drift(field, diffusion, x, t)


def _last_mean(field: Field, diffusion: Diffusion, x: State, t: Time) -> State:
    return x - t * _drift(field, diffusion, x, t)


def _last_euler(field: Field, diffusion: Diffusion, x: State, t: Time) -> State:
    return x - t * velocity(field, x, t)


def _last_tweedie(field: Field, diffusion: Diffusion, x: State, t: Time) -> State:
    pred, c = predict(field, x, t)
    return field.parametrization.data(pred, x, c)


def _last_none(field: Field, diffusion: Diffusion, x: State, t: Time) -> State:
    return x


METHODS: Mapping[str, Callable[[Field, Diffusion, State, Time, Time, State], State]] = {
    "euler": _euler_step,
    "heun": _heun_step,
    "mean": _mean_step,
}
LAST_STEPS: Mapping[str, Callable[[Field, Diffusion, State, Time], State]] = {
    "mean": _last_mean,
    "euler": _last_euler,
    "tweedie": _last_tweedie,
    "none": _last_none,
}
