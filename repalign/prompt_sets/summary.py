"""Scores of pictures, by tag and over all tags, with intervals over the prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

NORMAL_95 = 1.96  # quantile of the standard normal


class Judged(NamedTuple):
    """One picture.

    Attributes:
        place: of its prompt in the set.
        tag: of the prompt: what is asked of the picture.
        value: in [0, 1], or a cosine.
        notes: what a reader of single results wants to know.
    """

    place: int
    tag: str
    value: float
    notes: dict[str, object]


@dataclass(frozen=True)
class TagScore:
    """A mean over pictures.

    Attributes:
        value: the mean.
        ci95: half the width of its 95 % interval, or None for one prompt.
        pictures: how many.
        prompts: how many.
    """

    value: float
    ci95: float | None
    pictures: int
    prompts: int


def by_tag(judged: Iterable[Judged]) -> dict[str, TagScore]:
    """The mean of every tag, in the order of their first pictures.

    Pictures of one prompt are alike, so the interval is over prompts: 1.96 s / sqrt(P), with s the deviation (divisor
    P - 1) of the P prompts' means. It covers the choice of prompts and the draws together.
    """
    prompts: dict[str, dict[int, list[float]]] = {}
    for picture in judged:
        prompts.setdefault(picture.tag, {}).setdefault(picture.place, []).append(picture.value)
    return {tag: _score(list(own.values())) for tag, own in prompts.items()}


def overall(tags: dict[str, TagScore]) -> TagScore:
    """The mean over tags, each counted once, as GenEval prints it; intervals of independent tags add in squares."""
    count = len(tags)
    widths = [score.ci95 for score in tags.values()]
    known = [width for width in widths if width is not None]
    return TagScore(
        sum(score.value for score in tags.values()) / count,
        math.sqrt(sum(width**2 for width in known)) / count if len(known) == count else None,
        sum(score.pictures for score in tags.values()),
        sum(score.prompts for score in tags.values()),
    )


def _score(prompts: list[list[float]]) -> TagScore:
    values = [value for prompt in prompts for value in prompt]
    mean, count = sum(values) / len(values), len(prompts)
    means = [sum(prompt) / len(prompt) for prompt in prompts]
    centre = sum(means) / count
    deviation = math.sqrt(sum((m - centre) ** 2 for m in means) / (count - 1)) if count > 1 else None
    return TagScore(mean, None if deviation is None else NORMAL_95 * deviation / math.sqrt(count), len(values), count)
