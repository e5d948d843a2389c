"""task=prompts from a trained twin to scores: both benchmarks, their layouts, true loading of small random scorers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tasks.drawing
from tasks import prompts
from tasks.check import check_composition
from tasks.launch import compose
from tests.prompt_sets.made_up import write_blip, write_boxes, write_clip, write_masks
from tests.prompt_sets.test_compbench import write as write_compbench
from tests.prompt_sets.test_geneval import ENTRIES
from tests.prompt_sets.test_geneval import write as write_geneval
from tests.smoke.test_recipes_train import train

ROOT = Path(__file__).parents[2]
RECIPE = "experiment=sd3_d15"
PER_PROMPT = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of two steps, folders of scorers, files of prompts; copied by who changes it."""
    place = tmp_path_factory.mktemp("prompts")
    train(place / "runs", RECIPE)
    for name, write in (("masks", write_masks), ("boxes", write_boxes), ("clip", write_clip), ("blip", write_blip)):
        write(place / name)
    write_geneval(place)
    (place / "shape_val.txt").write_text("a round vase\n")
    (place / "texture_val.txt").write_text("a red book and a blue book\n")
    write_compbench(place)
    return place


def words(place: Path, benchmark: str) -> list[str]:
    """As they are typed."""
    chosen = {
        "geneval": [
            f"prompt_set.file={place}/evaluation_metadata.jsonl",
            f"prompt_set.scorer.detector.folder={place}/masks",
            f"prompt_set.scorer.image_text.folder={place}/clip",
        ],
        "t2i_compbench": [
            f"prompt_set.folder={place}",
            f"prompt_set.scorer.vqa.folder={place}/blip",
            f"prompt_set.scorer.detector.folder={place}/boxes",
            f"prompt_set.scorer.image_text.folder={place}/clip",
            "prompt_set.scorer.threshold=0.2",  # of random weights over two classes and none
        ],
    }[benchmark]
    task = ["task=prompts", f"prompt_set={benchmark}", f"prompt_set.per_prompt={PER_PROMPT}", "task.batch_size=2"]
    return [RECIPE, "debug=tiny", f"paths.runs={place}/runs", "run_name=run", *task, *chosen]


def run(place: Path, benchmark: str, *more: str) -> Path:
    cfg = compose([*words(place, benchmark), *more])
    check_composition(cfg)
    prompts.run(cfg)
    return Path(cfg.task.output)


def read(output: Path) -> tuple[dict, list[dict]]:
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return json.loads((output / "scores.json").read_text()), lines


def files(output: Path) -> set[str]:
    return {str(file.relative_to(output)) for file in output.rglob("*.png")}


def test_geneval(trained):
    output = run(trained, "geneval", f"task.output={trained}/geneval")
    for place, entry in enumerate(ENTRIES):
        assert json.loads((output / f"{place:05d}" / "metadata.jsonl").read_text()) == entry
    samples = {f"{place:05d}/samples/{k:05d}.png" for place in range(len(ENTRIES)) for k in range(PER_PROMPT)}
    assert files(output) == samples | {f"{place:05d}/grid.png" for place in range(len(ENTRIES))}
    with Image.open(output / "00000/samples/00000.png") as picture:
        assert picture.mode == "RGB" and picture.size[0] == picture.size[1]
    scores, lines = read(output)
    assert scores["scores"].keys() == {"geneval", *(f"geneval/{entry['tag']}" for entry in ENTRIES)}
    assert {line["filename"] for line in lines} == samples
    assert all(line["correct"] == (line["reason"] == "") == bool(line["value"]) for line in lines)
    assert scores["not_scored"] == 0 and scores["record"]["features"].startswith(
        "geneval-0.3-0.9-16-1.0-0.1/masks-100-"
    )


def test_compbench(trained):
    output = run(trained, "t2i_compbench", f"task.output={trained}/compbench")
    numbers = {"color": 2, "shape": 1, "texture": 1, "spatial": 1, "non_spatial": 1, "complex": 3}
    for category, count in numbers.items():
        lines = [line for line in (trained / f"{category}_val.txt").read_text().splitlines() if line]
        expected = {
            f"{prompt}_{PER_PROMPT * n + k:06d}.png" for n, prompt in enumerate(lines) for k in range(PER_PROMPT)
        }
        assert {file.name for file in (output / category / "samples").iterdir()} == expected and len(lines) == count
    scores, lines = read(output)
    found = scores["scores"]
    assert found.keys() == {f"t2i_compbench/{category}" for category in numbers} and scores["not_scored"] == 0
    for category, count in numbers.items():
        assert found[f"t2i_compbench/{category}"]["pictures"] == count * PER_PROMPT
        assert -1 <= found[f"t2i_compbench/{category}"]["value"] <= 1
    assert 0 < found["t2i_compbench/color"]["value"] < 1 and len(lines) == 18
    features = scores["record"]["features"]
    for part in ("color: attributes-rules/blip-vqa-", "spatial: spatial-0.2-", "complex: 3-in-1 of", "clip-text-"):
        assert part in features


KILLED = """
import os, signal, sys
import tasks.drawing
from tasks.launch import launch

tasks.drawing.SHARD, draw, shards = 2, tasks.drawing.generate, []


def generate(generator, wanted, seed, batch_size, device, rows=None):
    if rows is not None:
        shards.append(rows)
    if len(shards) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(generator, wanted, seed, batch_size, device, rows)


tasks.drawing.generate = generate
sys.exit(launch(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_drawing_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    """Two shards of two pictures are there when the third begins: the second run draws the others alone."""
    monkeypatch.setattr(tasks.drawing, "SHARD", 2)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs" / "sd3_d15" / "run" / "drawn", ignore_errors=True)
    typed = [*words(tmp_path, "geneval"), f"task.output={tmp_path}/killed"]
    done = subprocess.run([sys.executable, "-c", KILLED, *typed], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "killed").exists()
    drawn, draw = [], tasks.drawing.generate

    def generate(generator, wanted, seed, batch_size, device, rows=None):
        drawn.extend(rows or ())
        return draw(generator, wanted, seed, batch_size, device, rows)

    monkeypatch.setattr(tasks.drawing, "generate", generate)
    killed = run(tmp_path, "geneval", f"task.output={tmp_path}/killed")
    assert drawn == [4, 5]
    run(tmp_path, "geneval", f"task.output={tmp_path}/again")
    assert drawn == [4, 5]
    whole = run(tmp_path, "geneval", f"task.keep={tmp_path}/whole", f"task.output={tmp_path}/unkilled")
    assert drawn == [4, 5, *range(6)]
    assert files(killed) == files(whole)
    assert all((killed / name).read_bytes() == (whole / name).read_bytes() for name in files(whole))
    assert read(killed)[1] == read(whole)[1]


def test_missing_weights_are_said_before_anything_is_drawn(trained):
    """As it is typed; the weights of the last network alone are not there."""
    typed = [*words(trained, "t2i_compbench"), f"prompt_set.scorer.image_text.folder={trained}/none"]
    typed.append(f"task.keep={trained}/nothing")
    done = subprocess.run([sys.executable, "run.py", *typed], cwd=ROOT, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not (trained / "nothing").exists()
    for part in (
        f"prompt_set.scorer.image_text.folder: no folder '{trained}/none'",
        "expected a folder with config.json, tokenizer*.json and model.safetensors of a CLIP (T2I-CompBench: openai/",
        "hf download openai/clip-vit-large-patch14 --local-dir FOLDER",
        "set prompt_set.scorer.image_text.folder=FOLDER",
        "task.score=false draws and writes alone",
    ):
        assert part in line
