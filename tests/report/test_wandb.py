"""A W&B run, offline: what is in it, and that a killed and resumed training has no step twice."""

from collections import Counter

import pytest

from callbacks.journal import Journal
from callbacks.wandb_run import WandbRun
from tests.report.wandb_file import config, history
from tests.smoke.test_recipes_train import train

WORDS = ("experiment=sit_s", "logger=wandb", "steps=5", "callbacks.checkpoint.every=2", "callbacks.sample_grid.every=2")


class Killed(Exception):
    pass


def test_a_resumed_run_has_every_step_once(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", *WORDS)
    end = Journal.on_train_batch_end

    def mortal(self, trainer, pl_module, *rest):
        end(self, trainer, pl_module, *rest)
        if pl_module.progress.step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "on_train_batch_end", mortal)
        with pytest.raises(Killed):
            train(tmp_path / "killed", *WORDS)
    # Step 3 is logged; the newest checkpoint is of step 2.
    killed = train(tmp_path / "killed", *WORDS)
    found, expected = history(killed), history(whole)
    assert max(Counter((key, step) for key, step, _ in found).values()) == 1
    assert {(key, step) for key, step, _ in found} == {(key, step) for key, step, _ in expected}
    steps = sorted(step for key, step, _ in found if key == "train/loss")
    assert steps == [1, 2, 3, 4, 5]
    same = ("train/", "throughput/flops")
    assert [row for row in found if row[0].startswith(same)] == [r for r in expected if r[0].startswith(same)]

    runs = config(killed)
    assert len(runs) == 2 and len({identity for identity, _, _ in runs}) == 1
    for _, group, told in runs:
        assert group == "sit_s" and "steps=5" in told["variant"].split() and told["seed"] == 0
        assert told["backbone"]["_target_"] == "repalign.backbones.dit.DiT"


def test_tables_of_samples(tmp_path):
    run_dir = train(tmp_path, *WORDS)
    tables = [(step, value) for key, step, value in history(run_dir) if key == "grids/samples"]
    assert [step for step, _ in tables] == [0, 2, 4, 5]
    for _, table in tables:
        assert table["_type"] == "table-file" and table["ncols"] == 4 and table["nrows"] > 0
    media = run_dir / "wandb" / "latest-run" / "files" / "media"
    assert len(list((media / "table").rglob("*.json"))) == len(tables)


def test_what_comes_twice_is_left_out(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lightning.pytorch.loggers.WandbLogger.log_metrics", lambda self, m, s=None: seen.append((m, s))
    )
    first = WandbRun(str(tmp_path), project="p", offline=True)
    first.log_metrics({"train/loss": 1.0}, 10)
    first.log_metrics({"eval/fid": 3.0}, 10)
    first.log_metrics({"train/loss": 0.9}, 20)
    again = WandbRun(str(tmp_path), project="p", offline=True)
    again.log_metrics({"train/loss": 0.9, "train/new": 1.0}, 20)
    again.log_metrics({"train/loss": 0.9}, 20)
    again.log_metrics({"eval/checkpoint/fid": 2.0}, 10)  # of task=evaluate, which may ask for any checkpoint
    again.log_metrics({"eval/checkpoint/fid": 2.1}, 10)
    assert seen[3:] == [
        ({"train/new": 1.0}, 20),
        ({"eval/checkpoint/fid": 2.0}, 10),
        ({"eval/checkpoint/fid": 2.1}, 10),
    ]
