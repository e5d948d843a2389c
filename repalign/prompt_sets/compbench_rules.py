"""T2I-CompBench's rules: what a prompt asks for, and how well two boxes stand as it says."""

from __future__ import annotations

from collections.abc import Sequence

from repalign.encoders.detection import Detections
from repalign.prompt_sets.words import Sentence

Box = Sequence[float]  # x1, y1, x2, y2 in pixels
NEAR, SIDES = (
    ("next to", "on side of", "near"),
    ("on the left of", "on the right of", "on the bottom of", "on the top of"),
)
# In the order in which a prompt is searched for them. No box stands "on top of" another: the official rule has no such
# place, so that words of the category complex that say so give the objects' scores alone.
PLACES = ("on side of", "next to", "near", *SIDES, "on top of")
# What two objects of a prompt of the category complex may stand beside.
BETWEEN = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")
PEOPLE = ("girl", "boy", "man", "woman")
NO_OBJECTS = ("top", "the side", "the left", "the right")
MOST_PHRASES = 8
GRID = (479, 480)  # pixels: the shorter side of UniDet's input, and the most that the longer one may have
Asked = tuple[str, str]


def phrases_asked(read: Sentence) -> list[str]:
    """The first eight noun phrases that are no mere places."""
    return [phrase for phrase in read.phrases if phrase not in NO_OBJECTS][:MOST_PHRASES]


def without_adjectives(read: Sentence) -> str:
    """The words that are no adjectives, with a space between each."""
    return " ".join(text for text, kind in read.words if kind != "ADJ")


def place_asked(prompt: str) -> str | None:
    """The first of ``PLACES`` that the prompt holds."""
    return next((place for place in PLACES if place in prompt), None)


def objects_asked(read: Sentence) -> Asked | None:
    """The first and the last noun of a spatial prompt; people of any kind are 'person'."""
    nouns = [text for text, kind in read.words if kind == "NOUN"]
    return _people(nouns[0], nouns[-1]) if nouns else None


def objects_beside(read: Sentence) -> Asked | None:
    """The nouns before and after the one of ``BETWEEN`` that a prompt of the category complex holds.

    Before it the nearest noun or name, after it the first noun, else the last word of the first name. None unless they
    are two in all.
    """
    found: list[str] = []
    texts = [text for text, _ in read.words]
    for place in range(len(texts)):
        length = next((n for n in (3, 2, 1) if " ".join(texts[place : place + n]) in BETWEEN), None)
        if length is None:
            continue
        before, after = read.words[:place][::-1], read.words[place + length :]
        found += [text for text, kind in before if kind in ("NOUN", "PROPN")][:1]
        nouns = [text for text, kind in after if kind == "NOUN"]
        ends = zip(after, after[1:], strict=False)
        names = [text for (text, kind), (_, other) in ends if kind == "PROPN" and other != "PROPN"]
        found += (nouns or names)[:1]
    return _people(*found) if len(found) == 2 else None


def _people(first: str, last: str) -> Asked:
    return "person" if first in PEOPLE else first, "person" if last in PEOPLE else last


def placed(place: str | None, box: Box, other: Box, overlap: float = 0.1, distance: float = 150.0) -> float:
    """How well the first box stands at ``place`` of the other, in [0, 1].

    With the offset (dx, dy) from the first centre to the other: near is 1 if |dx| or |dy| is below ``distance`` pixels,
    else distance / max(|dx|, |dy|). A side is 1 when the offset has its direction, that direction is the longer part,
    and the boxes' intersection over union is below ``overlap``; overlap / IoU when it is not below; else 0.
    """
    dx, dy = ((other[axis] + other[axis + 2] - box[axis] - box[axis + 2]) / 2 for axis in (0, 1))
    if place in NEAR:
        return 1.0 if min(abs(dx), abs(dy)) < distance else distance / max(abs(dx), abs(dy))
    if place not in SIDES:
        return 0.0
    sign = {"on the left of": dx, "on the right of": -dx, "on the top of": dy, "on the bottom of": -dy}[place]
    along, across = (abs(dx), abs(dy)) if place in SIDES[:2] else (abs(dy), abs(dx))
    if sign <= 0 or along <= across:
        return 0.0
    shared = iou(box, other)
    return 1.0 if shared < overlap else overlap / shared


def iou(box: Box, other: Box) -> float:
    """Intersection over union; 0 for boxes without area."""
    sides = [max(0.0, min(box[a + 2], other[a + 2]) - max(box[a], other[a])) for a in (0, 1)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    union = sum(areas) - sides[0] * sides[1]
    return sides[0] * sides[1] / union if union > 0 else 0.0


def on_grid(height: int, width: int) -> float:
    """What boxes in pixels of a picture are multiplied by to be in those of UniDet's input."""
    short, long = sorted((height, width))
    return min(GRID[0] / short, GRID[1] / long)


def spatial_score(place: str | None, asked: Asked | None, found: Detections, distance: float = 150.0) -> float:
    """A quarter of each object's score plus half of :func:`placed`; what is below 1/2 counts as 0.

    Of several objects with one name the surest is taken.
    """
    if asked is None:
        return 0.0
    numbers = [_surest(name, found) for name in asked]
    score = sum(0.25 * float(found.scores[number]) for number in numbers if number is not None)
    first, last = numbers
    if first is not None and last is not None:
        score += placed(place, found.boxes[first].tolist(), found.boxes[last].tolist(), distance=distance) / 2
    return score if score >= 0.5 else 0.0


def _surest(name: str, found: Detections) -> int | None:
    own = [number for number, label in enumerate(found.labels) if label == name]
    return max(own, key=lambda number: float(found.scores[number]), default=None)
