"""The same global batch on one process and on two gives the same training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.smoke.test_recipes_train import column, train

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    alone = train(tmp_path / "one", "experiment=repa_sit_s", "steps=4", "data.batch_size=8")
    words = [
        *("experiment=repa_sit_s", "debug=tiny", "steps=4", "data.batch_size=8", "logger=csv", "run_name=run"),
        *("trainer.devices=2", "trainer.strategy=ddp", "callbacks.journal.every=1", f"paths.runs={tmp_path / 'two'}"),
    ]
    done = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = tmp_path / "two" / "repa_sit_s" / "run"
    for name in ("train/loss", "train/align/repa", "train/grad_norm"):
        torch.testing.assert_close(
            torch.tensor(column(shared, name)), torch.tensor(column(alone, name)), rtol=1e-5, atol=1e-6
        )
