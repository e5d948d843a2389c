"""Weights and dropout of a state's streams, around any objective."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.protocols import Backbone, Objective, Randomness
from repalign.state import Cond, Draw, State, Step, Streams

PER = ("batch", "sample")


@dataclass(frozen=True)
class StreamDropout:
    """Hides a stream in training, so that sampling may ask what the network says without it (ReDi, arXiv:2504.16064).

    Where it is dropped the stream's x_0 is zero and its loss counts nothing; the network then sees sigma_t eps there.

    Attributes:
        stream: its name.
        probability: of being dropped (ReDi: 0.2).
        per: ``batch`` throws one coin for all samples of a micro-batch on a rank (official code), ``sample`` one each,
            which gives the same loss on any number of ranks.
        noise: whether the noise stays. False zeroes it as well, so that the network sees exact zeros, as it does under
            :class:`repalign.guidance.representation.RepresentationGuidance`; so the paper's text, but not its code.

    Raises:
        UserError: for a probability outside [0, 1] or another ``per``.
    """

    stream: str
    probability: float
    per: Literal["batch", "sample"] = "batch"
    noise: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"objective.dropout.probability must be in [0, 1], found {self.probability}")
        if self.per not in PER:
            raise unknown_choice("objective.dropout.per", self.per, PER)

    def draw(self, random: Randomness) -> Bool[Tensor, " b"]:
        """Which samples lose the stream."""
        coin = random.uniform(f"drop/{self.stream}")
        return (coin if self.per == "sample" else coin[:1].expand_as(coin)) < self.probability

    def hide(self, state: State, dropped: Bool[Tensor, " b"]) -> Streams:
        """The state with zeros in the stream where it is dropped."""
        streams = _streams(state)
        if self.stream not in streams:
            raise unknown_choice("objective.dropout.stream", self.stream, streams, "stream")
        entry = streams[self.stream]
        hidden = torch.where(dropped.reshape(-1, *[1] * (entry.ndim - 1)), torch.zeros_like(entry), entry)
        return Streams({**streams, self.stream: hidden})


class WeightedStreams:
    """Another objective over several streams: loss = sum over streams of weight x that stream's loss.

    A term is of a stream when its name ends on ``/<stream>`` (``denoising/class_token``). Each is a mean over the
    stream's own entries, so a weight of 1 does not depend on how many channels a stream has. REG: 0.03 on the class
    token; ReDi: 1 on the features.

    Args:
        objective: gives the terms.
        weights: by stream; 1 where none is named.
        dropout: a stream that is hidden at times; None for none.

    Raises:
        UserError: at a call, when the state has no stream of a name.
    """

    def __init__(
        self, objective: Objective, weights: Mapping[str, float] | None = None, dropout: StreamDropout | None = None
    ) -> None:
        self.objective = objective
        self.weights = dict(weights or {})
        self.dropout = dropout

    @property
    def times(self) -> str:
        """Those of the objective."""
        return getattr(self.objective, "times", "sample")

    def draw(self, x_0: State, random: Randomness) -> Draw:
        """The objective's draw, and which samples lose a stream."""
        draw = self.objective.draw(x_0, random)
        if self.dropout is None:
            return draw
        return replace(draw, drop={**draw.drop, _key(self.dropout): self.dropout.draw(random)})

    def __call__(
        self,
        backbone: Backbone,
        x_0: State,
        cond: Cond,
        draw: Draw,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
    ) -> Step:
        """The objective's terms, weighted."""
        for name in self.weights:
            if name not in _streams(x_0):
                raise unknown_choice("objective.weights", name, _streams(x_0), "stream")
        factors: dict[str, float | Tensor] = dict(self.weights)
        if self.dropout is not None:
            dropped, name = draw.drop[_key(self.dropout)], self.dropout.stream
            x_0 = self.dropout.hide(x_0, dropped)
            if not self.dropout.noise and draw.eps is not None:
                draw = replace(draw, eps=self.dropout.hide(draw.eps, dropped))
            factors[name] = factors.get(name, 1.0) * ~dropped
        step = self.objective(backbone, x_0, cond, draw, taps=taps, only_taps=only_taps)
        losses = {term: factors.get(term.rpartition("/")[2], 1.0) * loss for term, loss in step.losses.items()}
        return replace(step, losses=losses)


def _key(dropout: StreamDropout) -> str:
    return f"stream/{dropout.stream}"


def _streams(state: State) -> Streams:
    if not isinstance(state, Streams):
        raise UserError(
            "objective and streams do not go together: weights of streams need a state of several; set "
            "streams=class_token token_io=patch_and_class or streams=pca_features token_io=channels, or "
            "objective=denoising"
        )
    return state
