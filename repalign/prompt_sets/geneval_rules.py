"""GenEval's rules: which objects count, where they stand to each other, whether a picture is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from repalign.encoders.detection import Detections

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
Box = Sequence[float]  # x1, y1, x2, y2 in pixels


def kept(detections: Detections, threshold: float, most: int = 16, overlap: float = 1.0) -> dict[str, list[int]]:
    """Numbers of the objects above the threshold by label, surest first, at most so many of each.

    Below 1, ``overlap`` drops of those an object whose box shares that much (intersection over union, of pixels: a
    side has one more than its difference) with a surer one's that stays.
    """
    found: dict[str, list[int]] = {}
    sure = (detections.scores > threshold).nonzero().flatten().tolist()
    for number in sorted(sure, key=lambda k: -float(detections.scores[k])):
        own = found.setdefault(detections.labels[number], [])
        if len(own) < most:
            own.append(number)
    if overlap < 1:
        boxes = detections.boxes.tolist()
        found = {label: _apart(own, boxes, overlap) for label, own in found.items()}
    return found


def _apart(numbers: Sequence[int], boxes: Sequence[Box], overlap: float) -> list[int]:
    stay: list[int] = []
    for number in numbers:
        if all(_shared(boxes[other], boxes[number]) < overlap for other in stay):
            stay.append(number)
    return stay


def _shared(box: Box, other: Box) -> float:
    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    inner = area(*(side(box[k], other[k]) for k, side in enumerate((max, max, min, min))))
    union = area(*box) + area(*other) - inner
    return inner / union if union else 0.0


def relations(box: Box, other: Box, margin: float = 0.1) -> set[str]:
    """Where the first box is, seen from the second.

    The offset o of the centres is shortened per axis by margin times the sum of both sides there, not below 0, and
    divided by the length of the whole o; a direction holds when its part is above 1/2. Boxes whose shortened offset is
    below 1e-3 have no relation. y grows downwards.
    """
    sides = [abs(b[axis + 2] - b[axis]) for axis in (0, 1) for b in (box, other)]
    offset = [(box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1)]
    reach = (margin * (sides[0] + sides[1]), margin * (sides[2] + sides[3]))
    short = [math.copysign(max(abs(o) - r, 0.0), o) for o, r in zip(offset, reach, strict=True)]
    if all(abs(part) < 1e-3 for part in short):
        return set()
    dx, dy = (part / math.hypot(*offset) for part in short)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in held.items() if holds}


def faults(
    asked: Mapping[str, Any],
    found: Mapping[str, Sequence[int]],
    boxes: Sequence[Box],
    colours: Callable[[Sequence[int], str], Sequence[str]],
    margin: float = 0.1,
) -> list[str]:
    """What is wrong with a picture; an empty list for a right one.

    Every ``include`` must hold: at least ``count`` objects of ``class``; of the surest ``count``, all of ``color``;
    each of them at ``position`` = [relation, number of an earlier include] to each of that one's. No ``exclude`` may:
    fewer than its ``count`` objects of its ``class``. A relation to an include that failed fails.

    Args:
        asked: a line of evaluation_metadata.jsonl.
        found: of :func:`kept`.
        boxes: of all detections, by number.
        colours: numbers of objects and their class -> a colour for each.
        margin: of :func:`relations`.
    """
    wrong: list[str] = []
    groups: list[Sequence[int] | None] = []
    for wish in asked.get("include", ()):
        name, count = wish["class"], wish["count"]
        own = list(found.get(name, ()))[:count]
        fault = _fault(wish, own, groups, boxes, colours, margin) if len(own) == count else None
        if len(own) < count:
            fault = f"expected {count} {name}, found {len(own)}"
        groups.append(own if fault is None else None)
        wrong += [] if fault is None else [fault]
    for wish in asked.get("exclude", ()):
        there = len(found.get(wish["class"], ()))
        if there >= wish["count"]:
            wrong.append(f"expected fewer than {wish['count']} {wish['class']}, found {there}")
    return wrong


def _fault(
    wish: Mapping[str, Any],
    own: Sequence[int],
    groups: Sequence[Sequence[int] | None],
    boxes: Sequence[Box],
    colours: Callable[[Sequence[int], str], Sequence[str]],
    margin: float,
) -> str | None:
    """Of colour and position; a wrong colour ends the look at the position."""
    name = wish["class"]
    if "color" in wish:
        seen = list(colours(own, name))
        if seen.count(wish["color"]) < wish["count"]:
            return f"expected {wish['count']} {wish['color']} {name}, found {', '.join(seen)}"
    if "position" in wish:
        relation, place = wish["position"]
        target = groups[place]
        if target is None:
            return f"nothing for {name} to be {relation}"
        for one in own:
            for other in target:
                if relation not in (held := relations(boxes[one], boxes[other], margin)):
                    return (
                        f"expected {name} {relation} its target, found {' and '.join(sorted(held)) or 'neither side'}"
                    )
    return None
