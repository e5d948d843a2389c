"""CLIP score: the mean cosine over pictures, the same for any batches; captions from files."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from callbacks.prompt_files import asked_for, read_prompts
from callbacks.score_log import score_lines
from repalign.encoders.clip import ClipImageText
from repalign.errors import UserError
from repalign.metrics.clip_score import ClipScore
from repalign.metrics.suite import FeatureMetrics
from tests.metrics.small import pictures
from tests.prompt_sets.made_up import write_clip

CAPTIONS = ["a red book", "a blue vase", "a photo of a book", "a vase and a book"] * 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return ClipImageText(write_clip(tmp_path_factory.mktemp("clip")))


def metrics_of(clip, captions=CAPTIONS, draws=0):
    scores = {"clip_score": ClipScore(), "clip_score_100": ClipScore(100.0, clamp=True)}
    metrics = FeatureMetrics(clip, scores, chunk=8, draws=draws)
    metrics.captions = captions
    return metrics


def test_it_is_the_mean_cosine(clip):
    images = pictures(20, 3)
    metrics = metrics_of(clip, draws=4)
    metrics.update(images)
    values = metrics.compute()
    (seen,) = clip((images * 255 + 0.5).floor() / 255)
    cosines = F.cosine_similarity(seen, clip.texts(CAPTIONS))
    assert values["clip_score"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert values["clip_score_100"] == pytest.approx(float(100 * cosines.clamp(min=0).mean()), abs=1e-4)
    assert 0 < values["clip_score_ci95"] < 1 and cosines.std() > 1e-3


def test_neither_batches_nor_order_matter(clip):
    images = pictures(20, 3)
    whole = metrics_of(clip)
    whole.update(images)
    parts = metrics_of(clip)
    for start in (14, 0, 7):
        serials = torch.arange(start, min(start + 7, 20))
        parts.update(images[serials], serials)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_the_protocol_names_the_captions(clip):
    lines = []
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        metrics = metrics_of(clip, captions)
        metrics.update(pictures(20, 3))
        lines.append(score_lines(metrics, metrics.compute(), {}, None)[0])
    first, second = lines
    assert first["record"]["reference"].startswith("captions-") and first["record"]["num_reference"] == 4
    assert first["protocol"] != second["protocol"] and first["value"] != second["value"]
    assert first["record"]["features"] == clip.fingerprint and "middle" in first["record"]["resize"]


def test_pictures_without_captions_are_refused(clip):
    metrics = metrics_of(clip, None)
    assert metrics.reads_captions and not metrics.reads_reference
    with pytest.raises(UserError, match="clip_score, clip_score_100 compares pictures with their captions"):
        metrics.update(pictures(20, 3))


def test_prompt_files(tmp_path):
    coco = {
        "annotations": [
            {"id": 7, "image_id": 2, "caption": "second\n"},
            {"id": 9, "image_id": 1, "caption": "a later one"},
            {"id": 3, "image_id": 1, "caption": " first  of all"},
        ]
    }
    texts = {
        "a.txt": "one\n\n two \n",
        "b.jsonl": '{"prompt": "one"}\n{"caption": "two", "x": 1}\n',
        "c.json": json.dumps(["one", "two"]),
        "d.json": json.dumps(coco),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert all(read_prompts(tmp_path / name, "k") == ["one", "two"] for name in ("a.txt", "b.jsonl", "c.json"))
    assert read_prompts(tmp_path / "d.json", "k") == ["first of all", "second"]
    assert asked_for({"prompts": None, "prompts_file": str(tmp_path / "a.txt")}) == (
        ["one", "two"],
        "task.prompts_file",
    )
    with pytest.raises(UserError, match="two sources of captions"):
        asked_for({"prompts": ["x"], "prompts_file": str(tmp_path / "a.txt")})


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("no.txt", None, "k: no file"),
        ("a.csv", "x", r"is .csv, expected .txt, .jsonl, .json"),
        ("a.txt", "\n", "holds no prompt"),
        ("a.jsonl", '{"x": 1}\n', "entry 1 has no field prompt, caption, text"),
        ("a.jsonl", "[]\n", "entry 1 is no object"),
        ("a.json", "{}", "cannot be read as prompts"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, text, match):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=match):
        read_prompts(tmp_path / name, "k")
