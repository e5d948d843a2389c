"""task=stages: a small MM-DiT over three sizes; stopped anywhere it ends as an uninterrupted training does."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from callbacks.checkpoint import checkpoints_in
from datamodules.buckets import bucket_sides
from repalign.errors import UserError
from repalign.paths.time import shift_time
from tasks import stages, train
from tasks.build import assemble
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.launch import compose

ROOT = Path(__file__).parents[2]
# Two blocks; rates at which weights move in two steps; sizes that differ.
WORDS = (
    "experiment=sd3_d24_stages", "debug=tiny", "backbone.depth=2", "backbone.dim=64", "ema.decay=0.5",
    "method.scheduler.warmup=1", "optimizer.lr=0.01", "callbacks.checkpoint.every=1", "~callbacks.sample_grid",
    "task.stages.px512.words=['data.image_size=64']", "task.stages.px1024.words=['data.image_size=96']",
)  # fmt: skip
LAST_GOES_ON = "task.stages.px1024.words=['data.image_size=96','steps=3']"
NAMES = ("01_px256", "02_px512", "03_px1024")


def composed(folder, *more):
    words = [*WORDS, f"paths.runs={folder}", f"paths.cache={folder}/cache", *more]
    cfg = compose(words)
    cfg.overrides = words
    check_composition(cfg)
    return cfg


def start(folder, *more):
    cfg = composed(folder, *more)
    stages.run(cfg)
    return Path(cfg.run_dir)


def last(run_dir):
    return torch.load(checkpoints_in(run_dir)[-1], weights_only=True)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def stop_at(monkeypatch, stage, step):
    """Ends the process, as it were, once that checkpoint is written."""
    save = train.pl.Trainer.save_checkpoint

    def hook(self, path, *args, **kwargs):
        save(self, path, *args, **kwargs)
        if (Path(path).parents[1].name, Path(path).stem) == (stage, f"step_{step:08d}"):
            raise SystemExit(137)

    monkeypatch.setattr(train.pl.Trainer, "save_checkpoint", hook)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return start(tmp_path_factory.mktemp("whole"))


def test_stops_between_and_within_stages_change_nothing(whole, tmp_path, monkeypatch, capsys):
    for stage, step in ((NAMES[0], 2), (NAMES[1], 1)):
        with monkeypatch.context() as patch:
            stop_at(patch, stage, step)
            with pytest.raises(SystemExit):
                start(tmp_path)
    capsys.readouterr()
    parts = start(tmp_path)
    said = capsys.readouterr().out
    assert said.count("is finished, not run again") == 1 and "resuming from" in said
    for name in NAMES:
        ours, theirs = last(parts / name), last(whole / name)
        assert same(ours["state_dict"], theirs["state_dict"]), name
        assert int(ours["progress"]["step"]) == int(theirs["progress"]["step"]) == 2


def test_weights_go_from_stage_to_stage_and_averages_to_averages(whole, tmp_path, capsys):
    """Before the first step a stage holds all of the one before, but for the position table."""
    seen = {}
    begin = train.start_from

    def hook(module, path):
        kept = begin(module, path)
        seen[Path(path).parents[1].name] = (kept, {key: x.clone() for key, x in module.state_dict().items()})
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "start_from", hook)
        start(tmp_path)
    assert list(seen) == list(NAMES[:2])
    for name, (kept, state) in seen.items():
        assert set(kept) == {"backbone.pos_embed"}
        held = last(whole / name)["state_dict"]
        tables = {key for key in held if key.endswith("pos_embed")}
        assert len(tables) == 2 and all(held[key].shape != state[key].shape for key in tables)
        assert same(*({k: v for k, v in states.items() if k not in tables} for states in (state, held)))
        moved = [k for k in held if k.startswith("trained.") and not torch.equal(held[k], held[f"ema.module.{k[8:]}"])]
        assert moved, "weights and their average differ, so that they could be mistaken for each other"
    assert "not from there: backbone.pos_embed" in capsys.readouterr().out
    first, second = (last(whole / name)["state_dict"]["trained.backbone.linear.weight"] for name in NAMES[:2])
    assert not torch.equal(first, second), "a stage trains"


def papers_table(dim, side, pixels):
    """arXiv:2403.03206, section 5.3.2, written down anew: rows and columns (p - (h_max - s)/2) 256/S, s = S/16."""
    at = (np.arange(side) - (side - pixels / 16) / 2) * 256 / pixels
    angles = at[:, None] * 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    shape = (side, side, dim // 2)
    return np.concatenate([np.broadcast_to(line[None], shape), np.broadcast_to(line[:, None], shape)], axis=2)


@pytest.mark.parametrize(("recipe", "pixels"), [("sd3_d24", 256), ("sd3_d24_512", 512), ("sd3_d24_1024", 1024)])
def test_positions_of_a_stage_are_the_papers(recipe, pixels, tmp_path):
    """Of the recipe as it is, made narrow: the table, and what the squares and the longest bucket take of it."""
    real = compose([f"experiment={recipe}", "data.root=."])
    assert real.data.image_size == pixels
    net = assemble(composed_tiny(tmp_path, recipe, pixels)).module.backbone
    squares = pixels // 16
    sides = (
        bucket_sides(pixels, real.data.bucket_step, real.data.bucket_ratio) if real.data.buckets else [(pixels,) * 2]
    )
    longest = max(max(pair) for pair in sides) // 16
    side = real.backbone.table_side or squares
    assert side == longest, "the table holds the longest bucket, and no more"
    table = papers_table(16, side, pixels)
    np.testing.assert_allclose(net.pos_embed[0].reshape(side, side, 16).numpy(), table, atol=1e-6)
    # The middle square covers the positions 0 .. 16 of 256 px, whatever its size.
    at = (np.arange(side) - (side - squares) / 2) * 256 / pixels
    assert at[(side - squares) // 2] == 0 and at[(side + squares) // 2 - 1] == 16 - 256 / pixels
    for height, width in sides:
        rows, columns = height // 16, width // 16
        top, left = (side - rows) // 2, (side - columns) // 2
        latent = torch.zeros(1, 8, height // 8, width // 8)
        with torch.no_grad():
            seen = (net.embed(latent) - net.patchify(latent))[0].reshape(rows, columns, 16).numpy()
        np.testing.assert_allclose(seen, table[top : top + rows, left : left + columns], atol=1e-6)


def composed_tiny(tmp_path, recipe, pixels):
    return compose(
        [
            f"experiment={recipe}",
            "debug=tiny",
            f"data.image_size={pixels}",
            "backbone.depth=1",
            f"paths.cache={tmp_path}",
        ]
    )


@pytest.mark.parametrize(("recipe", "shift"), [("sd3_d24_512", 2.0), ("sd3_d24_1024", 3.0)])
def test_times_are_shifted_alike_in_training_and_sampling(recipe, shift):
    cfg = compose([f"experiment={recipe}", "data.root=."])
    times = build(cfg.time_sampler, "time_sampler")
    assert times.shift == cfg.sampler.shift == shift
    t = torch.tensor(1 / 1000, dtype=torch.float64)
    assert cfg.sampler.last_step_size == pytest.approx(float(shift_time(t, shift)), rel=1e-12)


def test_finished_folders_are_kept_to_what_they_were(whole, tmp_path, capsys):
    shutil.copytree(whole.parent, tmp_path / "sd3_d24_stages")
    run_dir = tmp_path / "sd3_d24_stages" / "main"
    capsys.readouterr()
    start(tmp_path)
    assert capsys.readouterr().out.count("is finished, not run again") == 3

    listed = stages.composed(composed(tmp_path))
    for number, changes, line in (
        (0, {"seed": 1}, r"task.stages.px256: .*another composition \((data.)?seed was 0, is 1\)"),
        (1, {"sampler.steps": 7}, r"task.stages.px512: .*another composition \(sampler.steps was 4, is 7\)"),
        (0, {"steps": 1}, r"px256: steps: expected 2 or more, as many as it began with, found 1"),
        (0, {"steps": 3}, r"px256: is not finished, but '.*02_px512' has begun with what it was"),
        (
            1,
            {"run_dir": str(run_dir / "02_other")},
            r"02_px512' is no stage of this list \(01_px256, 02_other, 03_px1024",
        ),
    ):
        others = copy.deepcopy(listed)
        for key, value in changes.items():
            OmegaConf.update(others[number].cfg, key, value)
        with pytest.raises(UserError, match=line):
            stages.progress(others, run_dir)

    # How many work on it is no part of what it is; the last stage may go on; weights that nobody needs may be gone.
    for name in NAMES[:2]:
        shutil.rmtree(run_dir / name / "checkpoints")
    start(tmp_path, "data.num_workers=1", LAST_GOES_ON)
    assert last(run_dir / NAMES[2])["progress"]["step"] == 3
    shutil.rmtree(run_dir / NAMES[2])
    with pytest.raises(UserError, match=r"px512: is finished, but '.*step_00000002.ckpt', .*is gone; restore it"):
        stages.progress(listed, run_dir)
    assert json.loads((run_dir / NAMES[1] / "job.json").read_text())["composition"]["init_from"] == NAMES[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.stages=sd3_d24"], r"task.stages: expected a mapping"),
        (["task.stages.px256=sd3_d24"], r"px256: expected a mapping like"),
        (["+task.stages.px256.word=['steps=1']"], r"px256: unknown key 'word'. Did you mean 'words'\?"),
        (["task.stages.px512.experiment=sd3_d24_521"], r"px512: experiment: .*521'. Did you mean 'sd3_d24_512'\?"),
        (["task.stages.px256.experiment=sd3_d24_stages"], r"px256: experiment: expected a training, found .* stages"),
        (["task.stages.px512.words=['backbone.depht=2']"], r"px512: unknown key 'backbone.depht'. Did .*depth'"),
        (["task.stages.px256.words=['steps']"], r"px256.words: expected words like steps=1000, found 'steps'"),
        (["task.stages.px256.words=['run_dir=x']"], r"px256.words: 'run_dir=x': a stage is given its run_dir"),
        (["task.stages.px512.words=['init_from=x']"], r"px512.words: 'init_from=x': a stage is given its init_from"),
        (["task.stages.px1024.words=['autoencoder.weights=/nowhere']"], r"px1024: autoencoder.weights: .*/nowhere"),
        (["init_from=/nowhere.ckpt"], r"px256: init_from: no file '/nowhere.ckpt'"),
        (["resume=never"], r"resume: .* expected 'auto', found 'never'"),
        (["+task.stages.a-b={experiment:sd3_d24}"], r"task.stages.a-b: expected a name"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_the_first_step(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        cfg = compose([*WORDS, f"paths.runs={tmp_path}", *words])
        cfg.overrides = [*WORDS, f"paths.runs={tmp_path}", *words]
        stages.run(cfg)
    assert not list(tmp_path.rglob("job.json"))


def finished_in(folder):
    record = folder / "job.json"
    return record.is_file() and json.loads(record.read_text())["finished"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_as_it_is_typed_on_two_processes_killed_in_the_second_stage(tmp_path):
    """Every stage starts its own second process; two processes and one come to the same, but for rounding."""
    folder = tmp_path / "sd3_d24_stages" / "main"
    words = [*WORDS, f"paths.runs={tmp_path}", f"paths.cache={tmp_path}/cache"]
    line = [sys.executable, str(ROOT / "run.py"), *words, "trainer.devices=2", "trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not checkpoints_in(folder / NAMES[1]):
                assert first.poll() is None, (tmp_path / "first.log").read_text()[-2000:]
                time.sleep(0.05)
        finally:
            first.kill()
            first.wait()
    assert finished_in(folder / NAMES[0]) and not finished_in(folder / NAMES[2])
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "01_px256 is finished, not run again" in done.stdout
    alone = start(tmp_path / "alone")
    for name in NAMES:
        assert finished_in(folder / name)
        ours, theirs = (last(run_dir / name)["state_dict"] for run_dir in (folder, alone))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-3, msg=f"{name}: {key}")
