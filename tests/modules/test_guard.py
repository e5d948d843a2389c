"""The guard on a tiny recipe whose losses are spoilt on purpose."""

import json

import pytest
import torch

from callbacks.checkpoint import checkpoints_in
from callbacks.guard import Collapsed, Guard
from lightning_modules.generative import Generative
from lightning_modules.repa_e import REPAE
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


def test_bad_steps_in_a_row_are_noticed_at_the_next_look_and_rolled_back(monkeypatch, tmp_path):
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
    with pytest.raises(UserError, match=r"callbacks.guard.sigmas: expected more than 0"):
        Guard(sigmas=0)
    with pytest.raises(UserError, match=r"callbacks.guard.row: expected 1 or more, found 0"):
        Guard(row=0)


def spoil_alone(monkeypatch, module, steps, how):
    """At these steps alone the loss, a gradient or the batch is spoilt."""
    honest = module.training_step

    def spoilt(self, batch, batch_idx):
        bad = self.progress.step in steps
        kind = how[self.progress.step % len(how)]
        if bad and kind == "batch":
            pictures = {k for k, v in batch.items() if torch.is_tensor(v) and (v.is_floating_point() or k == "image")}
            batch = {k: v * float("nan") if k in pictures else v for k, v in batch.items()}
        hook = None
        if bad and kind == "gradient":
            hook = next(p for p in self.trained.parameters() if p.requires_grad).register_hook(
                lambda g: g + float("inf")
            )
        try:
            loss = honest(self, batch, batch_idx)
            return loss * float("nan") if bad and kind == "loss" and loss is not None else loss
        finally:
            if hook is not None:
                self.spoilt_hook = hook  # removed after the backward pass

    finished = module.finish_step

    def finish(self):
        finished(self)
        if hook := getattr(self, "spoilt_hook", None):
            hook.remove()
            self.spoilt_hook = None
        kept = {k: v for k, v in self.state_dict().items() if v.is_floating_point()}
        assert all(v.isfinite().all() for v in kept.values()), f"step {self.progress.step}"

    monkeypatch.setattr(module, "training_step", spoilt)
    monkeypatch.setattr(module, "finish_step", finish)


def test_nothing_that_is_not_finite_reaches_weights_or_average(monkeypatch, tmp_path, capsys):
    steps = {n for n in range(75) if n % 3}  # fifty of them, never three in a row
    spoil_alone(monkeypatch, Generative, steps, ("loss", "gradient", "batch", "loss", "batch"))
    train(tmp_path, "steps=75", "callbacks.guard.every=10")
    run_dir = tmp_path / "sit_s" / "run"
    assert column(run_dir, "train/skipped_steps")[-1] == 50
    assert "7 of the last 10 gradients refused" in capsys.readouterr().out


def test_running_statistics_of_latents_stay_finite_too(monkeypatch, tmp_path):
    spoil_alone(monkeypatch, REPAE, {2, 3, 6}, ("batch",))
    words = ("experiment=repa_e_sit_s", "steps=9", "callbacks.checkpoint.every=5", "~callbacks.sample_grid")
    run(compose(["debug=tiny", "run_name=run", "logger=csv", *words, f"paths.runs={tmp_path}"]))
    last = torch.load(checkpoints_in(tmp_path / "repa_e_sit_s" / "run")[-1], weights_only=True)
    assert float(last["progress"]["watch"]["refused"]) == 3
