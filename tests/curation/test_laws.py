"""What a curation may not depend on, and what it must find."""

from __future__ import annotations

import io
import json

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch

from datamodules.captioned import CaptionedFolder
from datamodules.curated import kept_of, read_decisions, write_decisions
from datamodules.curation import Measuring, judged, measured
from repalign.curation.neighbours import similar_pairs
from repalign.curation.quality import measures
from repalign.curation.steps import ScoreLimit, SizeLimits
from repalign.errors import UserError
from tests.curation.made import curated, steps, write_folder

REMOVED = {
    "b_exact.png": "near_duplicates",
    "b_flipped.png": "near_duplicates",
    "b_recompressed.jpg": "near_duplicates",
    "b_resized.png": "near_duplicates",
    "c_flat.png": "quality",
    "c_long.png": "size",
    "c_tiny.png": "size",
    "c_torn.png": "readable",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("curation") / "pictures")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_finds_what_was_planted_and_nothing_else(folder, cache):
    decisions = {one.name: one for one in curated(folder, cache)}
    removed = {name: one.step for name, one in decisions.items() if one.step}
    # Of two pictures of one size the better one stays: of a copy and its original either may be that one.
    pairs = {f"a{i:02d}.png": name for i, name in enumerate(("b_exact.png", "b_resized.png", "b_recompressed.jpg"))}
    pairs["a03.png"] = "b_flipped.png"
    assert {pairs.get(name, name): step for name, step in removed.items()} == REMOVED
    assert len(removed) == len(REMOVED)
    assert decisions["b_resized.png"].copy_of == "a01.png", "the larger one stays"
    assert decisions["b_exact.png"].copy_of == "a00.png", "of equals the smaller name stays"


def test_order_of_the_pictures_does_not_matter(folder, cache, tmp_path):
    shuffled = write_folder(tmp_path / "pictures", np.random.default_rng(1).permutation(28))
    assert curated(shuffled, tmp_path / "cache", batch=3, piece=7) == curated(folder, cache)


@pytest.mark.parametrize("clusters", [None, 3])
def test_curating_the_curated_removes_nothing(folder, cache, tmp_path, clusters):
    made = steps(clusters=clusters)
    write_decisions(tmp_path / "list", curated(folder, cache, made), {})
    kept = kept_of(CaptionedFolder(folder, 32, "skip", True, cache), tmp_path / "list")
    again = judged(kept, made, measured(kept, made, cache, Measuring()))
    assert len(again) == len(kept) < 28
    assert clusters or all(one.step is None for one in again)


def test_threshold_extremes(folder, cache):
    by_threshold = {
        threshold: [one.name for one in curated(folder, cache, steps(threshold)) if one.step == "near_duplicates"]
        for threshold in (0.0, 0.95, 1.0)
    }
    assert "b_exact.png" in by_threshold[1.0] and "b_recompressed.jpg" not in by_threshold[1.0]
    assert set(by_threshold[1.0]) < set(by_threshold[0.0])
    assert len(by_threshold[1.0]) < len(by_threshold[0.95]) < len(by_threshold[0.0])
    for wrong in (-0.1, 1.1):
        with pytest.raises(UserError, match="near_duplicates.threshold"):
            steps(wrong)


def test_another_limit_measures_nothing_again(folder, cache, monkeypatch):
    first = curated(folder, cache)
    monkeypatch.setattr("datamodules.curation.whole_picture", lambda *_: pytest.fail("measured again"))
    made = steps()
    made["size"] = SizeLimits(60, 10.0)
    reordered = dict(reversed(made.items()))
    assert [one.name for one in curated(folder, cache, reordered)] == [one.name for one in first]


def test_neighbours_are_those_of_all_products():
    torch.manual_seed(0)
    plain, mirrored = (torch.nn.functional.normalize(torch.randn(60, 4), dim=1) for _ in range(2))
    plain[7] = plain[3]
    alike = torch.maximum(plain @ plain.T, torch.maximum(mirrored @ plain.T, plain @ mirrored.T)).triu(1)
    one, other, values = similar_pairs(plain, mirrored, 0.9, None)
    found = dict(zip(zip(one.tolist(), other.tolist(), strict=True), values.tolist(), strict=True))
    assert set(found) == {tuple(pair) for pair in (alike >= 0.9).nonzero().tolist()}
    assert all(abs(float(alike[pair]) - value) < 1e-6 for pair, value in found.items())
    clustered = set(zip(*(side.tolist() for side in similar_pairs(plain, mirrored, 0.9, 5)[:2]), strict=True))
    assert (3, 7) in clustered < set(found)


def test_quality_of_known_pictures():
    flat = measures(torch.full((3, 32, 32), 90, dtype=torch.uint8))
    assert set(flat) == {"sharpness", "contrast", "entropy", "blocking", "quality"}
    assert all(value == pytest.approx(0, abs=1e-6) for value in flat.values())
    half = torch.zeros(3, 32, 32, dtype=torch.uint8)
    half[:, :, 16:] = 255
    found = measures(half)
    assert found["contrast"] == pytest.approx(0.5, abs=1e-5) and found["entropy"] == pytest.approx(1.0)
    # One border of three has the whole step; sums along the other direction are 0.
    assert found["blocking"] == pytest.approx(((1 / 3 + 1 / 255) / (1 / 255) - 1) / 2, rel=1e-4)
    blocks = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert measures(blocks)["blocking"] > 5 > 0.5 > abs(measures(torch.randint(0, 256, (3, 64, 64)).byte())["blocking"])


def test_of_a_drawing_and_its_jpeg_the_drawing_is_the_better_one():
    drawing = PIL.Image.new("RGB", (512, 512), "white")
    PIL.ImageDraw.Draw(drawing).ellipse((84, 76, 404, 420), fill="yellow", outline="black", width=12)
    drawing = drawing.resize((128, 128), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    drawing.save(file, format="JPEG", quality=40)
    found = [measures(torch.from_numpy(np.array(image)).permute(2, 0, 1)) for image in (drawing, PIL.Image.open(file))]
    assert found[0]["quality"] > found[1]["quality"] and found[0]["entropy"] < found[1]["entropy"]


def test_a_limit_keeps_what_is_at_it():
    class Fixed:
        fingerprint = "fixed"

        def __call__(self, pictures):
            return torch.tensor([0.25, 0.5, 0.75])

    class Held:
        measured = {"score": np.array([0.25, 0.5, 0.75], dtype=np.float32)}

    assert ScoreLimit(Fixed(), maximum=0.5).judge(Held()).reasons == {2: "score 0.75, more than 0.5"}
    assert ScoreLimit(Fixed(), minimum=0.5).judge(Held()).reasons == {0: "score 0.25, less than 0.5"}
    with pytest.raises(UserError, match="minimum or maximum"):
        ScoreLimit(Fixed())


def test_a_torn_picture_stops_unless_it_is_to_be_skipped(folder, tmp_path):
    source = CaptionedFolder(folder, 32, "stop", True, tmp_path)
    with pytest.raises(UserError, match="c_torn.png.*on_corrupt=skip"):
        measured(source, steps(), tmp_path, Measuring())


def test_a_list_that_was_changed_is_refused(folder, cache, tmp_path):
    write_decisions(tmp_path, curated(folder, cache), {})
    path = tmp_path / "pictures.jsonl"
    path.write_text(path.read_text().replace('"kept": true', '"kept": false', 1))
    with pytest.raises(UserError, match="data.keep: .* is not the list"):
        read_decisions(tmp_path)
    with pytest.raises(UserError, match="data.keep: no manifest.json"):
        read_decisions(tmp_path / "elsewhere")
    (tmp_path / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="holds no decisions"):
        read_decisions(tmp_path / "manifest.json")
