"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError
from repalign.protocols import Field, Parametrization, Path
from repalign.state import Cond, Output, State, Streams, concatenate, leading, map_state


class NoGuidance:
    """The conditional field alone."""

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field:
        return bind(cond)


class ClassifierFreeGuidance:
    """pred = pred_null + scale (pred_cond - pred_null), from one call on the doubled batch [cond, null].

    A scale of 1 is no guidance. Outside the interval the conditional half alone is evaluated, at half the cost, unless
    the backbone uses a carry, whose batch must not change its size.

    Args:
        scale: guidance scale w; 1 = off.
        interval: (low, high) in the house's time, both included (arXiv:2404.07724); REPA's best is (0, 0.7).
        channels: guide the first channels alone, the others and all heads keep the conditional half's values; None
            guides every channel. The released DiT and SiT figures use 3 of 4 latent channels, an official oddity.

    Raises:
        UserError: when not 0 <= low <= high <= 1, or channels is below 1, or is given for a state of several streams.
    """

    def __init__(self, scale: float, interval: tuple[float, float] = (0.0, 1.0), channels: int | None = None) -> None:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance.interval: expected 0 <= low <= high <= 1, found ({low}, {high})")
        if channels is not None and channels < 1:
            raise UserError(f"guidance.channels must be at least 1 or null, found {channels}")
        self.scale = scale
        self.interval = (float(low), float(high))
        self.channels = channels

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field:
        """The guided field."""
        if self.scale == 1:
            return bind(cond)
        return GuidedField(bind(cond), bind(cond.concatenate(null)), self.scale, self.interval, self.channels)


@dataclass(frozen=True)
class GuidedField:
    """A field under classifier-free guidance; a field itself, so guidance nests.

    Attributes:
        conditional: the field at the condition.
        both: the field at [condition, null condition], for a doubled batch.
        scale, interval, channels: see :class:`ClassifierFreeGuidance`.
        gate: whether to guide, decided once for a whole step; None to decide by the time of each call.
    """

    conditional: Field
    both: Field
    scale: float
    interval: tuple[float, float]
    channels: int | None = None
    gate: bool | None = None

    @property
    def path(self) -> Path:
        """The path of the guided field."""
        return self.conditional.path

    @property
    def parametrization(self) -> Parametrization:
        """The parametrization of the guided field."""
        return self.conditional.parametrization

    @property
    def uses_carry(self) -> bool:
        """Whether the backbone returns a carry (of the doubled batch)."""
        return self.conditional.uses_carry

    def guides(self, t: Float[Tensor, ""]) -> bool:
        """Whether t lies in the guidance interval."""
        low, high = self.interval
        return low <= float(t) <= high

    def during(self, t: Float[Tensor, ""]) -> GuidedField:
        """The field of a whole step that begins at t: guided, or not, at every call (REPA's Heun sampler)."""
        return replace(self, conditional=self.conditional.during(t), both=self.both.during(t), gate=self.guides(t))

    def __call__(self, x_t: State, t: Float[Tensor, ""], carry: Any = None) -> Output:
        """The guided prediction; everything else is the conditional half's, but the carry is that of both halves."""
        guided = self.guides(t) if self.gate is None else self.gate
        if not guided and not self.uses_carry:
            return self.conditional(x_t, t)
        both = self.both(concatenate(x_t, x_t), t, carry)
        count = len(leading(x_t))
        cond = replace(
            both,
            pred=None if both.pred is None else map_state(lambda x: x[:count], both.pred),
            heads={name: map_state(lambda x: x[:count], head) for name, head in both.heads.items()},
            taps={name: tokens.with_data(tokens.data[:count]) for name, tokens in both.taps.items()},
        )
        if not guided or both.pred is None or cond.pred is None:
            return cond
        null_pred = map_state(lambda x: x[count:], both.pred)
        return replace(cond, pred=guide(cond.pred, null_pred, self.scale, self.channels))


def guide(cond: State, null: State, scale: float, channels: int | None = None) -> State:
    """The state null + scale (cond - null) on the first channels (None: all); the others are those of ``cond``."""
    guided = null + scale * (cond - null)
    if channels is None:
        return guided
    if isinstance(guided, Streams) or isinstance(cond, Streams):
        raise UserError(
            "guidance.channels: a state of several streams has no common channels; set guidance.channels=null"
        )
    return torch.cat([guided[:, :channels], cond[:, channels:]], dim=1)
