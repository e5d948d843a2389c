"""The guard on a tiny recipe whose losses are spoilt on purpose."""

import json

import pytest
import torch

from callbacks.checkpoint import checkpoints_in
from callbacks.guard import Collapsed, Guard
from lightning_modules.generative import Generative
from repalign.errors import UserError
from tasks.launch import compose
from tasks.train import run
from tests.smoke.test_recipes_train import column

WORDS = ("experiment=sit_s", "debug=tiny", "run_name=run", "steps=30", "~callbacks.sample_grid", "logger=csv")
GUARD = (
    "callbacks.guard.every=2",
    "callbacks.guard.patience=4",
    "callbacks.checkpoint.every=5",
    "callbacks.checkpoint.keep=-1",
)


def spoil(monkeypatch, step, value, seed=0):
    """From this step on the loss is multiplied by ``value``, as long as the draws have this seed."""
    honest = Generative.training_step

    def spoilt(self, batch, batch_idx):
        loss = honest(self, batch, batch_idx)
        return loss * value if self.progress.step >= step and self.seed == seed else loss

    monkeypatch.setattr(Generative, "training_step", spoilt)


def train(tmp_path, *words):
    cfg = compose([*WORDS, *GUARD, *words, f"paths.runs={tmp_path}"])
    run(cfg)


def test_dead_gradients_stop_the_run_with_one_line(monkeypatch, tmp_path):
    spoil(monkeypatch, step=12, value=0.0)
    with pytest.raises(Collapsed) as caught:
        train(tmp_path)
    line = str(caught.value)
    assert "'train/grad_norm' has been exactly 0 since step 13" in line and "step_00000010.ckpt" in line
    assert "\n" not in line and caught.value.step in (16, 18)


def test_not_finite_is_noticed_at_the_next_look_and_rolled_back(monkeypatch, tmp_path):
    spoil(monkeypatch, step=12, value=float("nan"))
    train(tmp_path, "callbacks.guard.policy=roll_back")
    run_dir = tmp_path / "sit_s" / "run"
    (entry,) = json.loads((run_dir / "roll_backs.json").read_text())
    assert entry["to"] == 10 and entry["since"] == 13
    last = torch.load(checkpoints_in(run_dir)[-1], weights_only=True)
    assert last["progress"]["step"] == 30
    assert all(v.isfinite().all() for v in last["state_dict"].values() if v.is_floating_point())


def test_a_run_that_collapses_again_and_again_stops(monkeypatch, tmp_path):
    for seed in range(5):
        spoil(monkeypatch, step=12, value=float("inf"), seed=seed * 1_000_003)
    with pytest.raises(Collapsed):
        train(tmp_path, "callbacks.guard.policy=roll_back")
    assert len(json.loads((tmp_path / "sit_s" / "run" / "roll_backs.json").read_text())) == 3


def test_bounds_and_a_healthy_run(tmp_path):
    with pytest.raises(Collapsed, match="'train/loss' has been out of bounds since step 1;.*no checkpoint"):
        train(tmp_path / "a", "+callbacks.guard.bounds={loss: [0.0, 1e-3]}")
    train(tmp_path / "b", "+callbacks.guard.bounds={loss: [0.0, 1e3]}")
    assert len(column(tmp_path / "b" / "sit_s" / "run", "train/loss")) == 3


def test_unknown_policy():
    with pytest.raises(UserError, match="Did you mean 'stop'"):
        Guard(policy="stopp")
