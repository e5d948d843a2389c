"""T2I-CompBench's rules: noun phrases to ask for, and how well two boxes stand as a prompt says."""

from __future__ import annotations

from collections.abc import Sequence

from repalign.encoders.detection import Detections

Box = Sequence[float]  # x1, y1, x2, y2 in pixels
NEAR, SIDES = (
    ("next to", "on side of", "near"),
    ("on the left of", "on the right of", "on the bottom of", "on the top of"),
)
# In the order in which a prompt is searched for them.
PLACES = ("on side of", "next to", "near", *SIDES)
PEOPLE = ("girl", "boy", "man", "woman")
# What begins a noun phrase, and what ends one.
_ARTICLES = {"a", "an", "the", "one", "two", "three", "four", "some", "his", "her", "its", "their"}
_ENDS = set(
    "and or with on in at of by from to into onto over under near next behind beside between above below against "
    "around is are was were has have while that which who as for than its".split()
)


def noun_phrases(prompt: str) -> list[str]:
    """The noun phrases of a prompt of the pattern "a red book and a yellow vase".

    The benchmark takes spaCy's noun chunks. Here a phrase begins at an article, a numeral or the prompt's beginning,
    and ends before a conjunction, a preposition, an auxiliary verb or a comma: the same for the prompts that are
    made from templates, and more words than a chunk where a verb of another kind follows the noun.
    """
    phrases: list[list[str]] = [[]]
    for word in prompt.lower().rstrip(".").replace(",", " , ").split():
        if word == "," or word in _ENDS:
            phrases.append([])
            continue
        if word in _ARTICLES and phrases[-1]:
            phrases.append([])
        phrases[-1].append(word)
    return [" ".join(phrase) for phrase in phrases if set(phrase) - _ARTICLES]


def place_asked(prompt: str) -> str | None:
    """The first of ``PLACES`` that the prompt holds; 'on top of' counts as 'on the top of'."""
    text = prompt.lower().replace("on top of", "on the top of")
    return next((place for place in PLACES if place in text), None)


def objects_asked(prompt: str) -> tuple[str, str] | None:
    """The first and the last thing of a spatial prompt without articles; people of any kind are 'person'."""
    text = prompt.lower().replace("on top of", "on the top of")
    for place in PLACES:
        text = text.replace(place, " , ")
    found = [" ".join(word for word in phrase.split() if word not in _ARTICLES) for phrase in noun_phrases(text)]
    if len(found) < 2:
        return None
    first, last = ("person" if name in PEOPLE else name for name in (found[0], found[-1]))
    return first, last


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


def spatial_score(prompt: str, found: Detections, distance: float = 150.0) -> float:
    """A quarter of each object's score plus half of :func:`placed`; what is below 1/2 counts as 0.

    Of several objects with one name the surest is taken. An object of several words is looked for whole, then by its
    last word.
    """
    asked = objects_asked(prompt)
    if asked is None:
        return 0.0
    numbers = [_surest(name, found) for name in asked]
    score = sum(0.25 * float(found.scores[number]) for number in numbers if number is not None)
    first, last = numbers
    if first is not None and last is not None:
        score += (
            placed(place_asked(prompt), found.boxes[first].tolist(), found.boxes[last].tolist(), distance=distance) / 2
        )
    return score if score >= 0.5 else 0.0


def _surest(name: str, found: Detections) -> int | None:
    for wanted in (name, name.split()[-1]):
        own = [number for number, label in enumerate(found.labels) if label == wanted]
        if own:
            return max(own, key=lambda number: float(found.scores[number]))
    return None
