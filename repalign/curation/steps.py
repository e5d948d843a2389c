"""The interface of a step, and the steps that look at one picture at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from repalign.errors import UserError

Picture = UInt8[Tensor, "3 h w"]  # whole, not cut; sides differ


@dataclass(frozen=True)
class Candidates:
    """The pictures that a step judges, in the order of their names, so that the order of the data does not matter.

    Attributes:
        names: N of them, ascending.
        sizes: height and width, [N, 2].
        measured: what the step measured of each picture, [N, ...] by name.
    """

    names: Sequence[str]
    sizes: np.ndarray
    measured: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """What a step removes.

    Attributes:
        reasons: place among the candidates -> why it goes.
        copy_of: place -> place of the picture that stays in its stead.
    """

    reasons: Mapping[int, str]
    copy_of: Mapping[int, int] = field(default_factory=dict)


class Step(Protocol):
    """Measures every picture once, by itself; then judges all that the steps before it left.

    ``fingerprint`` stands for what is measured and not for the limits: another limit measures nothing again.
    """

    fingerprint: str

    def measure(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]: ...  # [B, ...] by name; may be empty
    def judge(self, candidates: Candidates) -> Verdict: ...


class Scorer(Protocol):
    """A number for every picture: a classifier's probability, an aesthetic score."""

    fingerprint: str

    def __call__(self, pictures: Sequence[Picture]) -> Tensor: ...  # [B]


class SizeLimits:
    """Shortest side and aspect ratio: min(h, w) >= ``shortest`` and max(h, w) / min(h, w) <= ``aspect``.

    Args:
        shortest: in pixels.
        aspect: 1 or more.

    Raises:
        UserError: for an aspect ratio below 1.
    """

    fingerprint = "sizes"  # which every picture has

    def __init__(self, shortest: int, aspect: float) -> None:
        if aspect < 1:
            raise UserError(f"task.steps.size.aspect: expected 1 or more, found {aspect}")
        self.shortest = shortest
        self.aspect = aspect

    def measure(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]:
        """Nothing: sizes are known."""
        return {}

    def judge(self, candidates: Candidates) -> Verdict:
        """Pictures that are too small or too long."""
        reasons = {}
        for place, (height, width) in enumerate(candidates.sizes.tolist()):
            short, long = sorted((height, width))
            if short < self.shortest:
                reasons[place] = f"shortest side {short} px, less than {self.shortest}"
            elif long > self.aspect * short:
                reasons[place] = f"aspect ratio {long / short:.2f}, more than {self.aspect:g}"
        return Verdict(reasons)


class ScoreLimit:
    """A limit on a score: an NSFW filter (``maximum``), an aesthetic threshold (``minimum``).

    Args:
        scorer: gives the score.
        minimum, maximum: null for none. A picture at the limit stays.

    Raises:
        UserError: when there is neither.
    """

    def __init__(self, scorer: Scorer, minimum: float | None = None, maximum: float | None = None) -> None:
        if minimum is None and maximum is None:
            raise UserError("task.steps: a limit on a score needs minimum or maximum, found neither")
        self.scorer = scorer
        self.minimum = minimum
        self.maximum = maximum
        self.fingerprint = f"score {scorer.fingerprint}"

    def measure(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]:
        """The score, float32."""
        return {"score": self.scorer(pictures).float()}

    def judge(self, candidates: Candidates) -> Verdict:
        """Pictures outside the limits."""
        return Verdict(outside("score", candidates.measured["score"], self.minimum, self.maximum))


def outside(what: str, values: np.ndarray, minimum: float | None, maximum: float | None) -> dict[int, str]:
    """Places of values outside of limits, with the reason."""
    reasons = {}
    if minimum is not None:
        reasons |= {int(i): f"{what} {values[i]:.4g}, less than {minimum:g}" for i in np.flatnonzero(values < minimum)}
    if maximum is not None:
        reasons |= {int(i): f"{what} {values[i]:.4g}, more than {maximum:g}" for i in np.flatnonzero(values > maximum)}
    return reasons
