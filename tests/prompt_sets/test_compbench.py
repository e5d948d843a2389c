"""T2I-CompBench's rules on made-up detections, its files, its layout, its scorers."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.prompt_sets.compbench import CompBench
from repalign.prompt_sets.compbench_rules import (
    objects_asked,
    objects_beside,
    on_grid,
    phrases_asked,
    place_asked,
    placed,
    spatial_score,
    without_adjectives,
)
from repalign.prompt_sets.compbench_scorers import CompBenchScorer, SpatialScorer
from repalign.prompt_sets.words import RuleReader, Sentence
from tests.prompt_sets.made_up import Answers, Finds, Hears, seen

READ = RuleReader()


def test_what_is_asked_of_attributes():
    read = Sentence([], ["the left", "a cup", "top", "the side", "the right", *"abcdefghij"])
    assert phrases_asked(read) == ["a cup", *"abcdefg"]


@pytest.mark.parametrize(
    ("prompt", "place", "objects"),
    [
        ("a girl on the left of a sheep", "on the left of", ("person", "sheep")),
        ("a dog next to a car", "next to", ("dog", "car")),
        ("a cup on top of a table", "on top of", ("cup", "table")),
        ("a cup", None, ("cup", "cup")),
        ("near", "near", None),
    ],
)
def test_what_a_spatial_prompt_asks_for(prompt, place, objects):
    assert place_asked(prompt) == place and objects_asked(READ(prompt)) == objects


@pytest.mark.parametrize(
    ("prompt", "objects"),
    [
        ("The red hat was on top of the brown rack.", ("hat", "rack")),
        ("The sleek black cat sat next to the tall man.", ("cat", "person")),
        ("The green plant is on the right of the white wall.", ("plant", "wall")),
        ("The red hat was inside the brown box.", None),
        ("A cat near a dog and a bird near a tree.", None),  # four are not two
    ],
)
def test_what_complex_prompts_ask_of_places(prompt, objects):
    assert objects_beside(READ(prompt)) == objects


def test_names_after_a_place_and_words_that_are_no_adjectives():
    words = "the DET bear PROPN near ADP a DET tall ADJ teddy PROPN bear PROPN . PUNCT".split()
    read = Sentence(list(zip(words[::2], words[1::2], strict=True)), [])
    assert objects_beside(read) == ("bear", "bear")  # the last word of a name
    assert without_adjectives(read) == "the bear near a teddy bear ."


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
        ("on top of", BOX, (0, 40, 10, 50), 0),  # the official rule knows no such place
        (None, BOX, RIGHT, 0),
    ],
)
def test_places(place, box, other, value):
    assert placed(place, box, other) == pytest.approx(value)


def test_spatial_scores():
    asked = "on the left of", ("vase", "book")
    both = seen(("vase", 0.9, BOX), ("book", 0.8, RIGHT), ("book", 0.6, (-90, 0, -80, 10)))
    assert spatial_score(*asked, both) == pytest.approx(0.25 * 0.9 + 0.25 * 0.8 + 0.5)
    turned = seen(("vase", 1.0, RIGHT), ("book", 0.9, BOX))
    assert spatial_score(*asked, turned) == 0  # 0.475 counts as nothing
    assert spatial_score(*asked, seen(("vase", 1.0, BOX))) == 0
    assert spatial_score("near", None, both) == 0


def test_distances_are_those_of_the_grid():
    assert on_grid(479, 479) == 1 and on_grid(958, 960) == pytest.approx(0.5) and on_grid(100, 960) == 0.5
    found = seen(("vase", 1.0, (0, 0, 4, 4)), ("book", 1.0, (40, 40, 44, 44)), ("book", 0.5, BOX))
    scorer = SpatialScorer(Finds(found), READ, synonyms={"jug": "vase"})
    small = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    assert scorer("a jug near a book", small) == pytest.approx([0.5 + 0.5 * 150 / (40 * 479 / 64)])
    assert scorer("a jug near a book", torch.zeros(1, 3, 479, 479, dtype=torch.uint8)) == [1]
    assert len(scorer._sure(found, 1.0).labels) == 2  # a score of 0.5 does not exceed 0.5


PICTURES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
PICTURES[0, 0], PICTURES[1, 2] = 255, 255  # red, blue
FOUND = seen(("vase", 1.0, (0, 0, 4, 4)), ("book", 1.0, (4, 0, 8, 4)), ("book", 0.4, (0, 0, 1, 1)))


def write(tmp_path):
    texts = {
        "color": "a red book and a yellow vase\n\na blue book\n",
        "spatial": "a vase next to a book\n",
        "non_spatial": "a red cat runs\n",
        "complex": "The vase is next to the book.\nThe red cat was lying on the mat.\nA vase near a big red book.\n",
        "complex_val_spatial": "The vase is next to the book.\n",
        "complex_val_action": "The vase is next to the book.\nThe red cat was lying on the mat.\n",
    }
    for name, text in texts.items():
        (tmp_path / (f"{name}.txt" if "_val_" in name else f"{name}_val.txt")).write_text(text)
    return tmp_path


def test_files_layout_and_values(tmp_path):
    answers = Answers()
    scorer = CompBenchScorer(answers, Finds(FOUND), Hears())
    bench = CompBench(write(tmp_path), ("color", "spatial", "non_spatial"), per_prompt=2, scorer=scorer)
    assert bench.prompts == ["a red book and a yellow vase", "a blue book", "a vase next to a book", "a red cat runs"]
    assert bench.layout(1).pictures == ["color/samples/a blue book_000002.png", "color/samples/a blue book_000003.png"]
    assert bench.layout(2).pictures[0] == "spatial/samples/a vase next to a book_000000.png"
    assert [one.value for one in bench.judge(0, PICTURES)] == pytest.approx([1 / 9] * 2)
    assert answers.asked == ["a red book?"] * 2 + ["a yellow vase?"] * 2
    assert [one.value for one in bench.judge(2, PICTURES)] == [1, 1]
    red, blue = (one.value for one in bench.judge(3, PICTURES))
    assert red > 0.99 and blue < 0.01
    assert CompBench(tmp_path, ("color",), per_prompt=2).judge(0, PICTURES) == []


def test_complex_is_the_mean_of_what_its_prompts_are_about(tmp_path):
    """Places where the first file lists the prompt, else actions where the second does, else both."""
    heard = []

    class Listens(Hears):
        def texts(self, captions):
            heard.extend(captions)
            return super().texts(captions)

    scorer = CompBenchScorer(Answers(), Finds(FOUND), Listens())
    bench = CompBench(write(tmp_path), ("complex",), per_prompt=2, scorer=scorer)
    attributes = round(1 / 4, 4), round(1 / 3 / 2, 4), round(1 / 8, 4)
    assert [one.value for one in bench.judge(0, PICTURES)] == pytest.approx([(attributes[0] + 1) / 2] * 2)
    assert heard == []
    red, blue = (one.value for one in bench.judge(1, PICTURES))
    assert heard == ["The cat was lying on the mat ."] and red == pytest.approx(blue)  # without "red", neither
    cosine = torch.nn.functional.cosine_similarity(torch.tensor([1.0, 0]), torch.tensor([1e-3, 1e-3]), dim=0).item()
    assert red == pytest.approx((1 / 3 * 1 / 2 + cosine) / 2, abs=1e-4)
    assert [one.value for one in bench.judge(2, PICTURES)] == pytest.approx([(attributes[2] + 1 + cosine) / 3] * 2)
    assert bench.scored_by().startswith("complex: 3-in-1 of attributes-rules/answers, spatial-")


def test_a_category_needs_its_networks(tmp_path):
    bench = CompBench(write(tmp_path), ("color", "complex"), "val", 2, CompBenchScorer(Answers()))
    assert len(bench.judge(0, PICTURES)) == 2 and bench.judge(2, PICTURES) == []
    with pytest.raises(UserError, match=r"prompt_set.scorer: has no network that scores complex; .*all three for comp"):
        CompBench(tmp_path, ("complex",), scorer=CompBenchScorer(Answers()))
    (tmp_path / "complex_val_action.txt").unlink()
    CompBench(tmp_path, ("complex",))
    with pytest.raises(UserError, match=r"prompt_set.folder: no file '.*complex_val_action.txt'"):
        CompBench(tmp_path, ("complex",), scorer=CompBenchScorer(Answers(), Finds(FOUND), Hears()))


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
