"""T2I-CompBench's rules on made-up detections, its files and its layout."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.prompt_sets.compbench import AttributeScorer, CaptionScorer, CompBench, SpatialScorer
from repalign.prompt_sets.compbench_rules import noun_phrases, objects_asked, place_asked, placed, spatial_score
from tests.prompt_sets.made_up import Answers, Finds, Hears, seen


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a red book and a yellow vase", ["a red book", "a yellow vase"]),
        ("A metallic desk and a fluffy rug.", ["a metallic desk", "a fluffy rug"]),
        ("the oval mirror is on the square table", ["the oval mirror", "the square table"]),
        ("red apple, green leaf", ["red apple", "green leaf"]),
        ("two dogs the size of a cat", ["two dogs", "the size", "a cat"]),
    ],
)
def test_noun_phrases(prompt, phrases):
    assert noun_phrases(prompt) == phrases


@pytest.mark.parametrize(
    ("prompt", "place", "objects"),
    [
        ("a girl on the left of a traffic light", "on the left of", ("person", "traffic light")),
        ("a dog next to a car", "next to", ("dog", "car")),
        ("a cup on top of a table", "on the top of", ("cup", "table")),
        ("a cup", None, None),
    ],
)
def test_what_a_spatial_prompt_asks_for(prompt, place, objects):
    assert place_asked(prompt) == place and objects_asked(prompt) == objects


BOX, RIGHT, FAR = (0, 0, 10, 10), (40, 0, 50, 10), (300, 400, 310, 410)


@pytest.mark.parametrize(
    ("place", "box", "other", "value"),
    [
        ("on the left of", BOX, RIGHT, 1),
        ("on the left of", RIGHT, BOX, 0),
        ("on the right of", RIGHT, BOX, 1),
        ("on the top of", BOX, (0, 40, 10, 50), 1),
        ("on the bottom of", (0, 40, 10, 50), BOX, 1),
        ("on the left of", BOX, (10, 40, 20, 50), 0),  # further down than to the side
        ("on the left of", BOX, (5, 0, 15, 10), 0.1 / (1 / 3)),  # they overlap
        ("near", BOX, RIGHT, 1),
        ("next to", BOX, FAR, 150 / 400),
        (None, BOX, RIGHT, 0),
    ],
)
def test_places(place, box, other, value):
    assert placed(place, box, other) == pytest.approx(value)


def test_spatial_scores():
    prompt = "a vase on the left of a book"
    both = seen(("vase", 0.9, BOX), ("book", 0.8, RIGHT), ("book", 0.6, (-90, 0, -80, 10)))
    assert spatial_score(prompt, both) == pytest.approx(0.25 * 0.9 + 0.25 * 0.8 + 0.5)
    turned = seen(("vase", 1.0, RIGHT), ("book", 0.9, BOX))
    assert spatial_score(prompt, turned) == 0  # 0.475 counts as nothing
    assert spatial_score(prompt, seen(("vase", 1.0, BOX))) == 0


def write(tmp_path):
    texts = {
        "color": "a red book and a yellow vase\n\na blue book\n",
        "spatial": "a vase next to a book\n",
        "non_spatial": "a red cat runs\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}_val.txt").write_text(text)
    return tmp_path


def test_files_layout_and_values(tmp_path):
    answers = Answers()
    found = seen(("vase", 1.0, (0, 0, 4, 4)), ("book", 1.0, (4, 0, 8, 4)), ("book", 0.4, (0, 0, 1, 1)))
    scorers = {"a": AttributeScorer(answers), "b": SpatialScorer(Finds(found)), "c": CaptionScorer(Hears())}
    bench = CompBench(write(tmp_path), ("color", "spatial", "non_spatial"), per_prompt=2, scorer=scorers)
    assert bench.prompts == ["a red book and a yellow vase", "a blue book", "a vase next to a book", "a red cat runs"]
    assert bench.layout(1).pictures == ["color/samples/a blue book_000002.png", "color/samples/a blue book_000003.png"]
    assert bench.layout(2).pictures[0] == "spatial/samples/a vase next to a book_000000.png"
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pictures[0, 0], pictures[1, 2] = 255, 255
    assert [one.value for one in bench.judge(0, pictures)] == pytest.approx([1 / 9] * 2)
    assert answers.asked == ["a red book?"] * 2 + ["a yellow vase?"] * 2
    assert [one.value for one in bench.judge(2, pictures)] == [1, 1]
    red, blue = (one.value for one in bench.judge(3, pictures))
    assert red > 0.99 and blue < 0.01
    alone = CompBench(tmp_path, ("color",), per_prompt=2)
    assert alone.judge(0, pictures) == []


def test_messages(tmp_path):
    with pytest.raises(UserError, match="prompt_set.folder: no folder named"):
        CompBench(None)
    with pytest.raises(UserError, match="unknown category 'colour'. Did you mean 'color'"):
        CompBench(write(tmp_path), ("colour",))
    with pytest.raises(UserError, match=r"prompt_set.folder: no file '.*shape_val.txt'"):
        CompBench(tmp_path, ("shape",))
    (tmp_path / "shape_val.txt").write_text("a round/oval table\n")
    with pytest.raises(UserError, match="'a round/oval table' .* cannot be part of a file name"):
        CompBench(tmp_path, ("shape",))
