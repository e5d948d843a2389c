"""task=prompts and captions in task=evaluate, around a tiny composition."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import tasks.evaluate
import tasks.prompts
import tasks.sample
from repalign.encoders.clip import ClipImageText
from repalign.errors import UserError
from repalign.metrics.clip_score import ClipScore
from repalign.metrics.suite import FeatureMetrics
from repalign.prompt_sets.compbench import CompBench
from repalign.prompt_sets.compbench_scorers import CompBenchScorer
from repalign.prompt_sets.geneval import GenEval, GenEvalScorer
from tasks.check import check_composition
from tasks.check_scores import check_prompt_set
from tasks.launch import compose
from tests.prompt_sets.made_up import Answers, Finds, Hears, seen, write_clip
from tests.prompt_sets.test_geneval import ENTRIES, write
from tests.report.test_sampling import torchrun
from tests.report.tiny import TinyData, TinyModule

ROOT = Path(__file__).parents[2]
NETWORKS = (
    "REPALIGN_DETECTOR",
    "REPALIGN_BOX_DETECTOR",
    "REPALIGN_BLIP_VQA",
    "REPALIGN_CLIP_SCORE",
    "REPALIGN_CLIP_B32",
)
FOUND = seen(("book", 0.95, (0, 0, 4, 4)), ("vase", 0.9, (0, 0, 8, 8)))


class Draws:
    """Red, and blue where the caption says so, with a random texture."""

    def __call__(self, captions, random):
        blue = torch.tensor(["blue" in caption for caption in captions]).float()
        colour = torch.stack([1 - blue, 0 * blue, blue], 1)[:, :, None, None] * 0.8
        return (colour + 0.05 * random.normal("x_1", (3, 8, 8))).clamp(0, 1)


class Reader(TinyModule):
    def __init__(self, run_dir, reads=("caption",)):
        super().__init__(run_dir)
        self.conditioner = SimpleNamespace(reads=reads)

    def generator(self, ema=True):
        return Draws()


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """A configuration of a task, and the composition behind it."""
    data = TinyData()
    data.captions = ("a red book", "a blue vase")
    assembly = SimpleNamespace(data=data, module=Reader(tmp_path))
    monkeypatch.setattr(tasks.sample, "assemble", lambda cfg: assembly)
    monkeypatch.setattr(tasks.sample, "load_weights", lambda module, path: None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000005.ckpt").write_bytes(b"")

    def compose(name, **changes):
        base = {"name": "tiny", "run_dir": str(tmp_path), "seed": 3, "paths": {"cache": str(tmp_path / "cache")}}
        base |= {"metric": {}, "data": {}, "sampler": {"steps": 4}, "guidance": {"scale": 1.5}}
        base |= {"prompt_set": {"scorer": {}}}
        base["protocol"] = OmegaConf.load(ROOT / "conf" / "protocol" / "default.yaml")
        task = OmegaConf.load(ROOT / "conf" / "task" / f"{name}.yaml")
        return OmegaConf.merge(base, {"task": task}, {"task": changes})

    compose.assembly = assembly
    return compose


@pytest.fixture
def geneval(tmp_path, monkeypatch):
    """Two pictures of each of three prompts."""
    file = write(tmp_path)

    def build(node, key):
        return GenEval(file, 2, None if node.scorer is None else GenEvalScorer(Finds(FOUND), Hears()))

    monkeypatch.setattr(tasks.prompts, "build", build)


def pixels(file):
    with Image.open(file) as picture:
        return np.array(picture)


def test_pictures_lie_as_the_official_scorer_takes_them_and_are_scored(composed, geneval, tmp_path, capsys):
    tasks.prompts.run(composed("prompts", batch_size=4))
    output = tmp_path / "prompts"
    for place, entry in enumerate(ENTRIES):
        folder = output / f"{place:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == entry
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["00000.png", "00001.png"]
        assert pixels(folder / "grid.png").shape == (12, 2 * 10 + 2, 3)
    blue = pixels(output / "00001" / "samples" / "00000.png")
    assert blue[..., 2].mean() > 150 > blue[..., 0].mean()
    first, second = (pixels(output / f"00000/samples/0000{k}.png") for k in (0, 1))
    assert not np.array_equal(first, second)
    result = json.loads((output / "scores.json").read_text())
    assert {name: score["value"] for name, score in result["scores"].items()} == {
        "geneval/single_object": 1,
        "geneval/colors": 1,
        "geneval/counting": 1,
        "geneval": 1,
    }
    assert result["scores"]["geneval"]["pictures"] == 6 and result["not_scored"] == 0
    assert result["record"]["reference"].startswith("geneval-") and "finds/hears" in result["record"]["features"]
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[2]["filename"] == "00001/samples/00000.png"
    assert {"tag", "prompt", "correct", "reason", "metadata"} <= lines[0].keys()
    numbers = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert {line["name"] for line in numbers} == set(result["scores"]) and numbers[0]["step"] == 5
    assert "geneval 1.0000" in capsys.readouterr().out


def test_without_scores_no_network_is_built(composed, geneval, tmp_path):
    tasks.prompts.run(composed("prompts", score=False))
    assert (tmp_path / "prompts" / "00002" / "grid.png").is_file()
    assert not (tmp_path / "prompts" / "scores.json").exists()


def test_several_processes_draw_the_same_pictures(composed, geneval, tmp_path):
    tasks.prompts.run(composed("prompts", keep=f"{tmp_path}/one", output=f"{tmp_path}/a"))
    several = composed("prompts", keep=f"{tmp_path}/several", output=f"{tmp_path}/b")
    torchrun(2, lambda: tasks.prompts.run(several))
    files = [file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.png")]
    assert len(files) == 9
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    one, other = (json.loads((tmp_path / name / "scores.json").read_text()) for name in "ab")
    assert one["scores"] == other["scores"] and one["protocol"] == other["protocol"]


def test_drawn_pictures_are_not_drawn_again(composed, geneval, tmp_path, monkeypatch):
    tasks.prompts.run(composed("prompts", score=False))
    monkeypatch.setattr(Draws, "__call__", None)
    tasks.prompts.run(composed("prompts"))
    assert (tmp_path / "prompts" / "scores.json").is_file()


def test_a_category_without_a_network_is_written_and_told(composed, tmp_path, monkeypatch):
    (tmp_path / "color_val.txt").write_text("a red book\n")
    (tmp_path / "complex_val.txt").write_text("a red book beside a blue vase.\n")

    def build(node, key):
        scorer = None if node.scorer is None else CompBenchScorer(Answers())
        return CompBench(tmp_path, ("color", "complex"), per_prompt=2, scorer=scorer)

    monkeypatch.setattr(tasks.prompts, "build", build)
    tasks.prompts.run(composed("prompts"))
    names = sorted(p.name for p in (tmp_path / "prompts" / "complex" / "samples").iterdir())
    assert names == [f"a red book beside a blue vase._00000{k}.png" for k in (0, 1)]
    result = json.loads((tmp_path / "prompts" / "scores.json").read_text())
    assert result["scores"].keys() == {"t2i_compbench/color"} and result["not_scored"] == 2


def test_prompt_messages(composed, geneval, tmp_path):
    with pytest.raises(UserError, match="task.keep: "):
        tasks.prompts.run(composed("prompts", keep=None))
    composed.assembly.module.conditioner = SimpleNamespace(reads=("label",))
    with pytest.raises(UserError, match="conditioner: tiny draws by class and reads no prompts"):
        tasks.prompts.run(composed("prompts"))


@pytest.mark.parametrize(
    ("name", "key", "file", "networks"),
    [
        ("geneval", "prompt_set.file", "evaluation_metadata.jsonl", ("detector", "image_text")),
        ("t2i_compbench", "prompt_set.folder", "", ("vqa", "detector", "image_text")),
    ],
)
def test_a_composition_says_what_is_missing(name, key, file, networks, tmp_path, monkeypatch):
    """Prompts, then the weights of each network: none is opened, nothing is imported."""
    for variable in ("REPALIGN_GENEVAL", "REPALIGN_T2I_COMPBENCH", *NETWORKS):
        monkeypatch.delenv(variable, raising=False)
    write(tmp_path)
    (tmp_path / "color_val.txt").write_text("a red book\n")
    cfg = compose(["experiment=sd3_embedded", "task=prompts", f"prompt_set={name}"])
    with pytest.raises(UserError, match=rf"{key}: no f.* named; expected .* or the environment variable REPALIGN_"):
        check_composition(cfg)
    OmegaConf.update(cfg, key, f"{tmp_path}/none")
    with pytest.raises(UserError, match=rf"{key}: no f.* '{tmp_path}/none'; expected .*; set {key}=F"):
        check_prompt_set(cfg)
    OmegaConf.update(cfg, key, str(tmp_path / file))
    if name == "t2i_compbench":
        cfg.prompt_set.categories = ["color"]
    for network in networks:
        with pytest.raises(UserError) as error:
            check_prompt_set(cfg)
        line = str(error.value)
        for part in (f"prompt_set.scorer.{network}.folder: no weights named; expected a folder with", "'hf download "):
            assert part in line
        assert "\n" not in line and line.endswith("; task.score=false draws and writes alone")
        assert any(f"variable {variable};" in line for variable in NETWORKS)
        cfg.prompt_set.scorer[network].folder = str(whole(tmp_path))
    check_prompt_set(cfg)
    cfg.prompt_set.scorer[network].folder, cfg.task.score = None, False
    check_prompt_set(cfg)
    assert len(tasks.prompts.prompt_set_of(cfg, score=False).prompts) == {"geneval": 3, "t2i_compbench": 1}[name]


def whole(folder):
    """A folder with the files of every network, none of which is opened by a check."""
    for file in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        (folder / file).touch()
    return folder


def scored_by_captions(composed, monkeypatch, folder):
    metrics = FeatureMetrics(ClipImageText(write_clip(folder)), {"clip_score": ClipScore()}, chunk=8, draws=4)
    data = composed.assembly.data
    monkeypatch.setattr(tasks.evaluate, "build", lambda node, key: {"metric": metrics, "data": data}[key])


def test_the_same_score_of_drawn_and_given_pictures(composed, tmp_path, monkeypatch):
    """Captions of the data and of a file; no reference is measured where captions stand for it."""
    scored_by_captions(composed, monkeypatch, tmp_path / "clip")
    drawing = {"num_samples": 8, "batch_size": 3}
    tasks.evaluate.run(composed("evaluate", **drawing))
    drawn = json.loads((tmp_path / "evaluation.json").read_text())
    assert drawn["reference"].startswith("captions-") and drawn["num_reference"] == 2
    assert drawn["metrics"]["clip_score_ci95"] > 0 and composed.assembly.data.read == 0
    tasks.sample.run(composed("sample", **drawing, write=["png"]))
    tasks.evaluate.run(composed("evaluate", samples=str(tmp_path / "generated" / "png")))
    given = json.loads((tmp_path / "generated" / "png" / "evaluation.json").read_text())
    assert given["metrics"] == pytest.approx(drawn["metrics"]) and given["reference"] == drawn["reference"]
    (tmp_path / "captions.txt").write_text("a blue vase\na red book\na book\n")
    tasks.evaluate.run(composed("evaluate", **drawing, prompts_file=str(tmp_path / "captions.txt")))
    other = json.loads((tmp_path / "evaluation.json").read_text())
    assert other["reference"] != drawn["reference"] and len(other["settings"]["prompts_file"]) == 16
    (tmp_path / "generated" / "captions.json").unlink()
    with pytest.raises(UserError, match="task.prompts_file: the metric reads captions"):
        tasks.evaluate.run(composed("evaluate", samples=str(tmp_path / "generated" / "png")))
    with pytest.raises(UserError, match="task.prompts_file: 3 captions for 8 pictures"):
        tasks.evaluate.run(
            composed("evaluate", samples=str(tmp_path / "generated/png"), prompts_file=str(tmp_path / "captions.txt"))
        )
