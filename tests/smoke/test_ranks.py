"""The same global batch on one process and on two gives the same training."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint import checkpoints_in
from tests.smoke.test_recipes_train import column, train

ROOT = Path(__file__).parents[2]


def alone_and_shared(tmp_path, recipe, *words):
    """Run folders of the same training on one process and on two."""
    words = (f"experiment={recipe}", "steps=4", "data.batch_size=8", *words)
    alone = train(tmp_path / "one", *words)
    words += ("debug=tiny", "logger=csv", "run_name=run", "trainer.devices=2", "trainer.strategy=ddp")
    words += ("callbacks.journal.every=1", f"paths.runs={tmp_path / 'two'}")
    done = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return alone, tmp_path / "two" / recipe / "run"


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    alone, shared = alone_and_shared(tmp_path, "repa_sit_s")
    for name in ("train/loss", "train/align/repa", "train/grad_norm"):
        torch.testing.assert_close(
            torch.tensor(column(shared, name)), torch.tensor(column(alone, name)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_two_ranks_train_repa_e_as_one(tmp_path):
    """Latent statistics are of the global batch. The discriminator's batch norms are each rank's own: in evaluation."""
    words = (
        "method.phases.autoencoder.evals=[backbone,aligners,norm,discriminator]",
        "method.phases.discriminator.evals=[discriminator]",
        "ema.decay=0.5",
    )
    alone, shared = alone_and_shared(tmp_path, "repa_e_sit_s", *words)
    phases = ("autoencoder", "discriminator", "denoiser")
    terms = [f"{kind}/{phase}" for kind in ("loss", "grad_norm") for phase in phases]
    for name in (*terms, "align/repa", "autoencoder/align/repa", "autoencoder/kl"):
        values = [torch.tensor(column(run, f"train/{name}")) for run in (shared, alone)]
        assert len(values[1]) == 4
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    found = [torch.load(checkpoints_in(run)[-1], weights_only=True)["state_dict"] for run in (shared, alone)]
    for key in ("trained.norm.running_mean", "trained.norm.running_var", "ema.module.norm.running_var"):
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-5, atol=1e-6)
    assert found[0]["trained.norm.num_batches_tracked"] == 4
