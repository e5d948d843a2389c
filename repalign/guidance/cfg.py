"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.protocols import Field, Parametrization, Path
from repalign.state import Cond, Output, State, Streams, concatenate, leading, map_state


class NoGuidance:
    """The conditional field alone."""

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field:
        return bind(cond)


class ClassifierFreeGuidance:
    """pred = pred_null + scale (pred_cond - pred_null), from one call on the doubled batch [cond, null].

    A scale of 1 is no guidance. Outside the interval the conditional half alone is evaluated, at half the cost, unless
    the sampler keeps what the backbone carries, whose batch must not change its size.

    Args:
        scale: guidance scale w; 1 = off.
        stream_scales: the scale of streams, by name, that have another one: REG guides its class token by a scale of
            its own; ReDi guides the latent alone, ``{features: 1}``, which leaves the conditional half's features.
        interval: (low, high) in the house's time (arXiv:2404.07724); REPA's best is (0, 0.7).
        channels: guide the first channels by ``scale``, the others by ``other_scale``; None guides every channel by
            ``scale``. All heads keep the conditional half's values. The released DiT and SiT figures use 3 of 4 latent
            channels, an official oddity.
        other_scale: guidance scale of the channels after the first ones; 1 keeps the conditional half's values.
        open_interval: leave out both ends of the interval (DDT); otherwise they are part of it (REPA).

    Raises:
        UserError: when not 0 <= low <= high <= 1, or channels is below 1, or is given for a state of several streams,
            or other_scale is given without channels; when a scale is given for a stream that the state has not.
    """

    def __init__(
        self,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        channels: int | None = None,
        other_scale: float = 1.0,
        open_interval: bool = False,
        stream_scales: Mapping[str, float] | None = None,
    ) -> None:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance.interval: expected 0 <= low <= high <= 1, found ({low}, {high})")
        if channels is not None and channels < 1:
            raise UserError(f"guidance.channels must be at least 1 or null, found {channels}")
        if other_scale != 1 and channels is None:
            raise UserError(f"guidance.other_scale: found {other_scale}, but no other channels; set guidance.channels")
        self.scale = scale
        self.interval = (float(low), float(high))
        self.channels = channels
        self.other_scale = other_scale
        self.open_interval = open_interval
        self.stream_scales = dict(stream_scales or {})

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field:
        """The guided field."""
        if {self.scale, self.other_scale, *self.stream_scales.values()} == {1}:
            return bind(cond)
        blend = partial(
            guide,
            scale=self.scale,
            channels=self.channels,
            other_scale=self.other_scale,
            stream_scales=self.stream_scales,
        )
        return GuidedField(
            bind(cond), bind(cond.concatenate(null)), blend, self.interval, open_interval=self.open_interval
        )


def same_state(x_t: State) -> State:
    """The weaker half of classifier-free guidance sees what the stronger one sees."""
    return x_t


@dataclass(frozen=True)
class GuidedField:
    """A field that extrapolates from a weaker prediction, by one call on a doubled batch; a field itself, so it nests.

    Attributes:
        conditional: the stronger field, at the condition.
        both: the field of a doubled batch: the condition, then that of the weaker half (the null condition).
        blend: how the two predictions become one.
        interval, open_interval: see :class:`ClassifierFreeGuidance`.
        weaken: what the weaker half sees of the state.
        gate: whether to guide, decided once for a whole step; None to decide by the time of each call.
    """

    conditional: Field
    both: Field
    blend: Callable[[State, State], State]
    interval: tuple[float, float]
    weaken: Callable[[State], State] = same_state
    open_interval: bool = False
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
        if not self.open_interval:
            return low <= float(t) <= high
        # In float32, so that a time which meets an end up to rounding is not inside.
        low, at, high = torch.tensor([low, float(t), high], dtype=torch.float32).tolist()
        return low < at < high

    def during(self, t: Float[Tensor, ""]) -> GuidedField:
        """The field of a whole step that begins at t: guided, or not, at every call (REPA's Heun sampler)."""
        return replace(self, conditional=self.conditional.during(t), both=self.both.during(t), gate=self.guides(t))

    def __call__(self, x_t: State, t: Float[Tensor, ""], carry: Any = None) -> Output:
        """The guided prediction; everything else is the stronger half's, but a carry that is kept is of both halves."""
        guided = self.guides(t) if self.gate is None else self.gate
        if not guided and carry is None:
            return self.conditional(x_t, t)
        both = self.both(concatenate(x_t, self.weaken(x_t)), t, carry)
        count = len(leading(x_t))
        cond = replace(
            both,
            pred=None if both.pred is None else map_state(lambda x: x[:count], both.pred),
            heads={name: map_state(lambda x: x[:count], head) for name, head in both.heads.items()},
            taps={name: tokens.with_data(tokens.data[:count]) for name, tokens in both.taps.items()},
        )
        if not guided or both.pred is None or cond.pred is None:
            return cond
        return replace(cond, pred=self.blend(cond.pred, map_state(lambda x: x[count:], both.pred)))


def guide(
    cond: State,
    null: State,
    scale: float,
    channels: int | None = None,
    other_scale: float = 1.0,
    stream_scales: Mapping[str, float] | None = None,
) -> State:
    """The state null + scale (cond - null) on the first channels (None: all), with ``other_scale`` on the others.

    Streams are guided one by one, by ``stream_scales`` where it names them. At a scale of 1 a stream is exactly that of
    ``cond``.

    Raises:
        UserError: for channels of several streams, or scales of streams that are not there.
    """
    if isinstance(cond, Streams) and isinstance(null, Streams):
        if channels is not None:
            raise UserError(
                "guidance.channels: a state of several streams has no common channels; set guidance.channels=null and "
                "guidance.stream_scales"
            )
        scales = {**dict.fromkeys(cond, scale), **(stream_scales or {})}
        for name in scales:
            if name not in cond:
                raise unknown_choice("guidance.stream_scales", name, cond, "stream")
        return Streams({name: _extrapolate(cond[name], null[name], scales[name]) for name in cond})
    assert isinstance(cond, Tensor) and isinstance(null, Tensor)
    if stream_scales:
        raise UserError("guidance.stream_scales: the state has one stream; set guidance.scale alone")
    guided = _extrapolate(cond, null, scale)
    others = _extrapolate(cond, null, other_scale)
    return guided if channels is None else torch.cat([guided[:, :channels], others[:, channels:]], dim=1)


def _extrapolate(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    return strong if scale == 1 else weak + scale * (strong - weak)
