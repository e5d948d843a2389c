"""GenEval's rules on made-up detections, its file and its layout."""

from __future__ import annotations

import json

import pytest
import torch

from repalign.encoders.detection import boxes_of, instances
from repalign.errors import UserError
from repalign.prompt_sets.colours import Colours, cut_out
from repalign.prompt_sets.geneval import GenEval, GenEvalScorer
from repalign.prompt_sets.geneval_rules import faults, kept, relations
from repalign.prompt_sets.summary import Judged, by_tag, overall
from tests.prompt_sets.made_up import Finds, Hears, seen

LEFT, RIGHT, UPPER = (0, 0, 10, 10), (50, 0, 60, 10), (0, -50, 10, -40)


def wrong(asked, found, colours=lambda numbers, name: ["red"] * len(numbers)):
    return faults({"include": [], **asked}, kept(found, 0.3), found.boxes.tolist(), colours)


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        (UPPER, LEFT, {"above"}),
        (LEFT, UPPER, {"below"}),
        ((0, 0, 10, 10), (40, 40, 50, 50), {"left of", "above"}),
        ((0, 0, 10, 10), (1, 1, 11, 11), set()),  # within the margin of 0.1 x 20 pixels
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # exactly on it
        ((0, 0, 10, 10), (3, 0, 13, 10), set()),  # (3 - 2) / 3 of the offset is left: a third
        ((0, 0, 10, 10), (5, 0, 15, 10), {"left of"}),  # (5 - 2) / 5
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ],
)
def test_relations(box, other, expected):
    assert relations(box, other) == expected


def test_the_surest_objects_above_the_threshold_count():
    found = seen(("book", 0.4, LEFT), ("book", 0.9, RIGHT), ("book", 0.25, LEFT), ("vase", 0.2, LEFT))
    assert kept(found, 0.3) == {"book": [1, 0]} and kept(found, 0.3, most=1) == {"book": [1]}
    assert kept(seen(("book", 0.3, LEFT)), 0.3) == {}  # on the threshold, in the precision of scores


def test_overlapping_objects_may_count_once():
    """Sides of pixels: [0, 9] is ten wide."""
    found = seen(
        ("book", 0.9, (0, 0, 9, 9)), ("book", 0.8, (5, 0, 14, 9)), ("book", 0.7, (10, 0, 19, 9)), ("vase", 0.6, LEFT)
    )
    assert kept(found, 0.3) == {"book": [0, 1, 2], "vase": [3]}
    assert kept(found, 0.3, overlap=0.34) == {"book": [0, 1, 2], "vase": [3]}  # a third is shared
    assert kept(found, 0.3, overlap=1 / 3) == {"book": [0, 2], "vase": [3]}  # the third one overlaps what is dropped
    assert kept(found, 0.3, most=2, overlap=1 / 3) == {"book": [0], "vase": [3]}


def test_counts_and_what_must_not_be_there():
    two = seen(("book", 0.9, LEFT), ("book", 0.8, RIGHT))
    assert wrong({"include": [{"class": "book", "count": 2}]}, two) == []
    assert wrong({"include": [{"class": "book", "count": 3}]}, two) == ["expected 3 book, found 2"]
    assert wrong({"include": [{"class": "vase", "count": 1}]}, two) == ["expected 1 vase, found 0"]
    asked = {"include": [{"class": "book", "count": 2}], "exclude": [{"class": "book", "count": 3}]}
    assert wrong(asked, two) == []
    three = seen(("book", 0.9, LEFT), ("book", 0.8, RIGHT), ("book", 0.7, UPPER))
    assert wrong(asked, three) == ["expected fewer than 3 book, found 3"]


def test_colours_of_the_surest_objects_alone():
    found = seen(("book", 0.9, LEFT), ("book", 0.8, RIGHT))
    asked = {"include": [{"class": "book", "count": 1, "color": "red"}]}
    looked = []
    assert wrong(asked, found, lambda numbers, name: looked.append((list(numbers), name)) or ["red"]) == []
    assert looked == [([0], "book")]
    assert wrong(asked, found, lambda numbers, name: ["blue"]) == ["expected 1 red book, found blue"]


def test_positions_and_a_target_that_failed():
    asked = {
        "include": [{"class": "vase", "count": 1}, {"class": "book", "count": 1, "position": ["left of", 0]}],
    }
    assert wrong(asked, seen(("vase", 0.9, RIGHT), ("book", 0.9, LEFT))) == []
    (fault,) = wrong(asked, seen(("vase", 0.9, LEFT), ("book", 0.9, RIGHT)))
    assert fault == "expected book left of its target, found right of"
    faults_found = wrong(asked, seen(("book", 0.9, LEFT)))
    assert faults_found == ["expected 1 vase, found 0", "nothing for book to be left of"]


def test_a_cut_out_is_grey_outside_its_mask():
    picture = torch.zeros(3, 6, 8, dtype=torch.uint8)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:4, 1:5] = True
    cut = cut_out(picture, torch.tensor([0.6, 1.4, 5.2, 4.0]), mask)
    assert cut.shape == (3, 3, 4) and cut[0].tolist() == [[0x99] * 4, [0] * 4, [0] * 4]
    assert cut_out(picture, torch.tensor([9.0, 9.0, 9.0, 9.0]), None).shape == (3, 1, 1)


def test_the_classifier_names_the_colour():
    picture = torch.zeros(3, 10, 60, dtype=torch.uint8)
    picture[0, :, :30], picture[2, :, 30:] = 255, 255
    found = seen(("book", 0.9, (0, 0, 10, 10)), ("book", 0.8, (50, 0, 60, 10)))
    assert Colours(Hears(), ("red", "blue"))(picture, found, [0, 1], "book") == ["red", "blue"]


ENTRIES = [
    {"tag": "single_object", "include": [{"class": "book", "count": 1}], "prompt": "a photo of a book"},
    {"tag": "colors", "include": [{"class": "vase", "count": 1, "color": "blue"}], "prompt": "a photo of a blue vase"},
    {
        "tag": "counting",
        "include": [{"class": "book", "count": 1}],
        "exclude": [{"class": "book", "count": 2}],
        "prompt": "a photo of one book",
    },
]


def write(tmp_path, entries=ENTRIES):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_file_layout_and_verdicts(tmp_path):
    found = seen(("book", 0.95, (0, 0, 4, 4)), ("book", 0.5, (4, 0, 8, 4)), ("vase", 0.9, (0, 0, 8, 8)))
    scorer = GenEvalScorer(Finds(found), Hears(), {"mouse": "computer mouse"})
    geneval = GenEval(write(tmp_path), 2, scorer)
    layout = geneval.layout(1)
    assert layout.pictures == ["00001/samples/00000.png", "00001/samples/00001.png"]
    assert layout.grid == "00001/grid.png" and json.loads(layout.texts["00001/metadata.jsonl"]) == ENTRIES[1]
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    pictures[0, 0], pictures[1, 2] = 255, 255
    assert [one.value for one in geneval.judge(0, pictures)] == [1, 1]
    red, blue = geneval.judge(1, pictures)
    assert (red.value, blue.value) == (0, 1) and red.notes["reason"] == "expected 1 blue vase, found red"
    assert [one.value for one in geneval.judge(2, pictures)] == [1, 1]  # counting: 0.5 is below its threshold


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"tag": "x"}, "line 1 of .* has no prompt and tag"),
        ({"tag": "x", "prompt": "p", "include": [{"class": "a"}]}, "include without class and count"),
        ({"tag": "x", "prompt": "p", "include": [{"class": "a", "count": 1, "color": "gren"}]}, "Did you mean 'green'"),
        (
            {"tag": "x", "prompt": "p", "include": [{"class": "a", "count": 1, "position": ["above", 0]}]},
            "number of an earlier entry",
        ),
    ],
)
def test_lines_that_are_not_genevals(tmp_path, entry, match):
    with pytest.raises(UserError, match=match):
        GenEval(write(tmp_path, [entry]))


def test_missing_files_and_classes(tmp_path):
    with pytest.raises(UserError, match="prompt_set.file: no file named; expected evaluation_metadata.jsonl"):
        GenEval(None)
    unknown = [{"tag": "x", "prompt": "p", "include": [{"class": "zebra", "count": 1}]}]
    with pytest.raises(UserError, match=r"prompt_set.scorer.names: the detector has no 'zebra' \(1 of 1"):
        GenEval(write(tmp_path, unknown), 1, GenEvalScorer(Finds(seen()), Hears()))


def test_the_overall_score_is_the_mean_over_tags_with_intervals_over_prompts():
    values = {"a": [[1, 1], [0, 0], [1, 0]], "b": [[1, 1]]}
    judged = [
        Judged(place, tag, value, {})
        for tag, prompts in values.items()
        for place, prompt in enumerate(prompts)
        for value in prompt
    ]
    tags = by_tag(judged)
    assert tags["a"].value == 0.5 and (tags["a"].pictures, tags["a"].prompts) == (6, 3)
    assert tags["a"].ci95 == pytest.approx(1.96 * 0.5 / 3**0.5) and tags["b"].ci95 is None
    assert overall(tags).value == 0.75 and overall(tags).ci95 is None  # not 5/8, the mean over pictures


def test_instances_from_queries():
    """Two queries: one of class 0 on the left half, one that is nothing."""
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    masks = torch.full((2, 2, 4), -9.0)
    masks[0, :, :2] = 9.0
    found = instances(logits, masks, {0: "book", 1: "vase"}, (2, 4), most=3)
    assert found.labels == ["book"] and found.boxes.tolist() == [[0, 0, 2, 2]]
    assert found.scores[0] > 0.99 and found.masks[0].tolist() == [[True, True, False, False]] * 2
    assert boxes_of(torch.zeros(0, 2, 4, dtype=torch.bool)).shape == (0, 4)
