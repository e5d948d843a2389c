"""Every recipe takes two steps with debug=tiny and leaves a complete run folder."""

import csv
import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint import checkpoints_in
from tasks.check import check_composition
from tasks.launch import compose
from tasks.run_records import parse
from tests.docs.names import undescribed

RECIPES = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))


def train(tmp_path: Path, *overrides: str) -> Path:
    words = [*overrides, "debug=tiny", f"paths.runs={tmp_path}", "run_name=run", "callbacks.journal.every=1"]
    cfg = compose(words)
    cfg.overrides = words
    check_composition(cfg)
    importlib.import_module(f"tasks.{cfg.task.name}").run(cfg)
    return Path(cfg.run_dir)


def column(run_dir: Path, name: str) -> list[float]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["name"] == name]


def names_in(run_dir: Path) -> set[str]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return {row["name"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe, tmp_path):
    run_dir = train(tmp_path, f"experiment={recipe}")
    stages = compose([f"experiment={recipe}"]).task.get("stages")
    folders = [run_dir / f"{number:02d}_{name}" for number, name in enumerate(stages, start=1)] if stages else [run_dir]
    for folder in folders:
        losses = column(folder, "train/loss")
        assert len(losses) == 2
        assert all(math.isfinite(loss) for loss in losses)
        assert checkpoints_in(folder)[-1].name == "step_00000002.ckpt"
        for name in ("config.yaml", "run.json"):
            assert (folder / name).is_file()
        assert not undescribed(names_in(folder))
        record = parse(json.loads((folder / "record.json").read_text()), recipe)
        assert record.steps == 2 and record.flops > 0 and record.device_hours > 0 and record.epochs > 0


def test_alignment_begins_near_zero_and_sit_has_none(tmp_path):
    aligned = train(tmp_path / "a", "experiment=repa_sit_s")
    assert abs(column(aligned, "train/align/repa")[0]) < 0.5
    assert not column(train(tmp_path / "b", "experiment=sit_s"), "train/align/repa")


def test_accumulation_gives_the_same_step(tmp_path):
    whole = train(tmp_path / "a", "experiment=repa_sit_s", "data.accumulate=1")
    split = train(tmp_path / "b", "experiment=repa_sit_s", "data.accumulate=2")
    for name in ("train/loss", "train/grad_norm", "train/align/repa"):
        torch.testing.assert_close(
            torch.tensor(column(whole, name)), torch.tensor(column(split, name)), rtol=1e-4, atol=1e-5
        )


def test_frozen_parts_stay_out_of_the_checkpoint(tmp_path):
    last = torch.load(checkpoints_in(train(tmp_path, "experiment=repa_sit_s"))[-1], weights_only=True)
    assert {key.split(".")[0] for key in last["state_dict"]} == {"trained", "ema"}


def test_two_encoders_train_two_heads(tmp_path):
    """REPA with several encoders: one aligner each, the weight shared out."""
    run_dir = train(
        tmp_path,
        "experiment=repa_sit_s",
        "+encoder@encoders.second=tiny",
        "+aligner@aligners.second=repa",
        "aligners.second.target.encoder=second",
        "align.weight=0.25",
    )
    terms = {name: column(run_dir, f"train/{name}")[0] for name in ("loss", "denoising", "align/repa", "align/second")}
    expected = terms["denoising"] + 0.25 * (terms["align/repa"] + terms["align/second"])
    assert math.isclose(terms["loss"], expected, rel_tol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["path=vp"],
        ["path=gvp", "parametrization=noise", "objective=sit_likelihood", "clock.flip_sign=false"],
        ["parametrization=score", "objective=sit_score", "clock.flip_sign=false"],
        ["path=vp", "parametrization=noise", "objective=sit_velocity_weight", "clock.flip_sign=false"],
        ["parametrization=data", "clock=native"],
    ],
)
def test_other_paths_and_predictions_train(words, tmp_path):
    losses = column(train(tmp_path, "experiment=sit_s", *words), "train/loss")
    assert all(math.isfinite(loss) for loss in losses)


def test_a_run_that_was_killed_after_its_last_step_says_what_it_lacks(tmp_path, capsys):
    run_dir = train(tmp_path, "experiment=sit_s")
    train(tmp_path, "experiment=sit_s")
    assert "stopped after them" not in capsys.readouterr().out
    status = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(status | {"status": "running"}))
    train(tmp_path, "experiment=sit_s")
    assert "task=evaluate or task=sample" in capsys.readouterr().out
