"""Representation guidance (ReDi, arXiv:2504.16064, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from repalign.errors import UserError, unknown_choice
from repalign.guidance.cfg import GuidedField, guide
from repalign.protocols import Field
from repalign.state import Cond, State, Streams


class RepresentationGuidance:
    """pred = pred_without + scale (pred - pred_without): away from what is predicted without the features.

    The weaker half has the same condition and a state whose features are exactly zero; every stream is guided. It needs
    a network that has seen hidden features in training (:class:`repalign.objectives.streams.StreamDropout`), where the
    official code leaves their noise: training shows sigma_t eps, sampling 0. A scale of 1 is no guidance.

    Args:
        scale: w_r; ReDi: 1.5 for B, 1.1 for XL.
        stream: the stream that is taken away.
        interval: (low, high) in the house's time, both included.

    Raises:
        UserError: when not 0 <= low <= high <= 1; at a call, when the state has no such stream.
    """

    def __init__(self, scale: float, stream: str = "features", interval: tuple[float, float] = (0.0, 1.0)) -> None:
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance.interval: expected 0 <= low <= high <= 1, found ({low}, {high})")
        self.scale = scale
        self.stream = stream
        self.interval = (float(low), float(high))

    def __call__(self, bind: Callable[[Cond], Field], cond: Cond, null: Cond) -> Field:
        """The guided field."""
        if self.scale == 1:
            return bind(cond)
        blend = partial(guide, scale=self.scale)
        return GuidedField(bind(cond), bind(cond.concatenate(cond)), blend, self.interval, self._without)

    def _without(self, x_t: State) -> State:
        if not isinstance(x_t, Streams):
            raise UserError(f"guidance.stream: the state has one stream, no '{self.stream}'; set streams=pca_features")
        if self.stream not in x_t:
            raise unknown_choice("guidance.stream", self.stream, x_t, "stream")
        return Streams({**x_t, self.stream: torch.zeros_like(x_t[self.stream])})
