"""Skip-layer guidance: away from the prediction of the same network without some of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
from repalign.guidance.cfg import guide
from repalign.protocols import Field, Parametrization, Path
from repalign.state import Cond, Output, State, concatenate, leading, map_state


class SkipLayerGuidance:
    """pred = null + scale (cond - null) + skip_scale (cond - skipped); the last term within an interval of t alone.

    ``skipped`` is the conditional prediction with some blocks passed over (Stable Diffusion 3.5 medium). Two calls a
    step within the interval, one on a doubled batch. Linear in the prediction, so it is the same whatever is predicted.

    Args:
        scale: of classifier-free guidance; 1 = off, the null condition is then not evaluated.
        skip_scale: s.
        layers: blocks that are passed over, 1-based (SD3.5 medium: 8, 9, 10; its code counts from 0).
        interval: (low, high) in the house's time, ends included. Deviation: the official code goes by the number of the
            step; :func:`interval_of_steps` converts.

    Raises:
        UserError: when not 0 <= low <= high <= 1, when there is no layer, or a layer below 1; at a call for a backbone
            that cannot pass over blocks.
    """

    def __init__(
        self, scale: float, skip_scale: float, layers: Sequence[int], interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance.interval: expected 0 <= low <= high <= 1, found ({low}, {high})")
        if not layers or min(layers) < 1:
            raise UserError(f"guidance.layers: expected numbers of blocks from 1, found {list(layers)}")
        self.scale = scale
        self.skip_scale = skip_scale
        self.layers = tuple(layers)
        self.interval = (float(low), float(high))

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field:
        """The guided field."""
        both = bind(cond) if self.scale == 1 else bind(cond.concatenate(null))
        return SkipLayerField(both, bind(replace(cond, skip=self.layers)), self.scale, self.skip_scale, self.interval)


@dataclass(frozen=True)
class SkipLayerField:
    """See :class:`SkipLayerGuidance`.

    Attributes:
        both: the field of a doubled batch, condition then null; at a scale of 1 the conditional field.
        skipped: the conditional field without the blocks.
        scale, skip_scale, interval: see :class:`SkipLayerGuidance`.
        gate: whether the second term is added, decided once for a whole step; None to decide by each call's time.
    """

    both: Field
    skipped: Field
    scale: float
    skip_scale: float
    interval: tuple[float, float]
    gate: bool | None = None

    @property
    def path(self) -> Path:
        """The path of the guided field."""
        return self.both.path

    @property
    def parametrization(self) -> Parametrization:
        """The parametrization of the guided field."""
        return self.both.parametrization

    @property
    def uses_carry(self) -> bool:
        """Never: backbones that can pass over blocks keep nothing between calls."""
        return False

    def skips(self, t: Float[Tensor, ""]) -> bool:
        """Whether t lies in the interval."""
        return self.interval[0] <= float(t) <= self.interval[1]

    def during(self, t: Float[Tensor, ""]) -> SkipLayerField:
        """The field of a whole step that begins at t."""
        return replace(self, both=self.both.during(t), skipped=self.skipped.during(t), gate=self.skips(t))

    def __call__(self, x_t: State, t: Float[Tensor, ""], carry: Any = None) -> Output:
        """The guided prediction alone."""
        count = len(leading(x_t))
        if self.scale == 1:
            pred = cond = _prediction(self.both(x_t, t))
        else:
            halves = _prediction(self.both(concatenate(x_t, x_t), t))
            cond = map_state(lambda x: x[:count], halves)
            pred = guide(cond, map_state(lambda x: x[count:], halves), self.scale)
        if self.skips(t) if self.gate is None else self.gate:
            pred = pred + self.skip_scale * (cond - _prediction(self.skipped(x_t, t)))
        return Output(pred)


def interval_of_steps(times: Float[Tensor, " n"], start: float, end: float) -> tuple[float, float] | None:
    """The times of the steps i with start N < i < end N, both strict, as an interval; None when there is no such step.

    Args:
        times: the grid of N steps, [N + 1], from noise to data; i counts from 0.
        start: fraction of the steps, as in Stable Diffusion 3.5's code.
        end: another one.
    """
    steps = len(times) - 1
    inside = [float(times[i]) for i in range(steps) if start * steps < i < end * steps]
    return (inside[-1], inside[0]) if inside else None


def _prediction(output: Output) -> State:
    assert output.pred is not None, "a field that is sampled has a prediction"
    return output.pred
