"""Implicit sampling of a discrete chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.paths.interpolant import scale
from repalign.paths.vp import DiscreteVPPath
from repalign.protocols import Field, Randomness
from repalign.samplers.ddpm import discrete_path, estimate_x_0
from repalign.samplers.grid import initial_state
from repalign.state import State

ENDS = ("data", "first_step")
BeforeStep = Callable[[State, Tensor, Randomness], State]  # state, time, draws of the step -> state


class DDIM:
    """x_{k-1} = sqrt(abar_{k-1}) x_0 + sqrt(1 - abar_{k-1} - s^2) eps + s n over a respaced chain.

    s = eta sqrt((1 - abar_{k-1}) / (1 - abar_k)) sqrt(1 - abar_k / abar_{k-1}). x_0 and eps are those of the field's
    prediction; eps is derived again from a clipped x_0. abar before the first kept step is 1, so that the last step
    returns x_0 (ADM, DiT), or that of the chain's first step (``end: first_step``; LDM).

    Source: arXiv:2010.02502, equations 12 and 16, as ADM and DiT run it; with ``steps: ldm200`` and ``end: first_step``
    as LDM does. A learned variance is not used.

    Args:
        steps: which steps of the path's chain are taken, as a number or a respacing
            (:func:`repalign.paths.schedules.kept_steps`; ``ddim50`` for the paper's stride, ``ldm50`` for LDM's).
        eta: 0 is deterministic, 1 has DDPM's variance.
        clip: clamp the estimate of x_0 to [-1, 1]: right for pixels, wrong for latents.
        end: where the last step leads: ``data`` or ``first_step``.
        dtype: of the trajectory, float32 or float64.

    Raises:
        UserError: when eta is not in [0, 1], the end is none of the two, or the path is not discrete.
    """

    def __init__(
        self,
        steps: str | int = "50",
        eta: float = 0.0,
        clip: bool = False,
        end: str = "data",
        dtype: str = "float32",
    ) -> None:
        if not 0 <= eta <= 1:
            raise UserError(f"sampler.eta must be in [0, 1], found {eta}")
        if end not in ENDS:
            raise unknown_choice("sampler.end", end, ENDS, "end")
        self.steps = steps
        self.eta = eta
        self.clip = clip
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
        """Run the chain; the j-th step reads the stream ``noise`` of stage j if its s is not 0.

        Args:
            field: what is sampled.
            x_1: pure noise.
            random: the draws.
            trace: sees every new state.
            trace_x_0: sees every estimate of x_0.
            before_step: changes the state before each step (:class:`repalign.samplers.known_region.KnownRegion`).
        """
        steps = ddim_steps(discrete_path(field), self.steps, self.eta, self.end)
        x = initial_state(x_1, self.dtype)
        for j, index in enumerate(reversed(range(len(steps)))):
            t, now, before, spread = steps.at(index)
            if before_step is not None:
                x = before_step(x, t, random.at(j))
            x_0 = estimate_x_0(field, field(x, t), x, t, self.clip)
            eps = scale(1 / (1 - now).sqrt(), x - scale(now.sqrt(), x_0))
            x = implicit_step(x_0, eps, before, spread)
            if spread > 0:
                x = x + scale(spread, random.at(j).normal_like("noise", x))
            if trace_x_0 is not None:
                trace_x_0(x_0)
            if trace is not None:
                trace(x)
        return x


@dataclass(frozen=True)
class ImplicitSteps:
    """The kept steps of a chain from data to noise, each [S] float64.

    Attributes:
        times: house times at which the field is called.
        alpha_bar, alpha_bar_before: abar at the step and where it leads.
        spread: s, the deviation of the noise that is added.
    """

    times: Float[Tensor, " s"]
    alpha_bar: Float[Tensor, " s"]
    alpha_bar_before: Float[Tensor, " s"]
    spread: Float[Tensor, " s"]

    def __len__(self) -> int:
        return len(self.times)

    def at(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Time, abar, abar before, s of one step."""
        return self.times[index], self.alpha_bar[index], self.alpha_bar_before[index], self.spread[index]


def ddim_steps(path: DiscreteVPPath, steps: str | int, eta: float, end: str) -> ImplicitSteps:
    """The numbers of :class:`DDIM` for a chain; ``end`` is ``data`` or ``first_step``."""
    chain = path.respaced(steps)
    now = chain.alphas_cumprod
    last = torch.ones_like(now[:1]) if end == "data" else path.respaced("").alphas_cumprod[:1]
    before = torch.cat([last, now[:-1]])
    spread = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
    return ImplicitSteps(chain.times, now, before, spread)


def implicit_step(x_0: State, eps: State, before: Tensor, spread: Tensor) -> State:
    """The mean of the earlier state: sqrt(abar) x_0 + sqrt(1 - abar - s^2) eps with abar where the step leads."""
    return scale(before.sqrt(), x_0) + scale((1 - before - spread**2).clamp(min=0).sqrt(), eps)
