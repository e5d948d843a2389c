"""REPA-E killed without warning: three optimizers, running statistics and the average go on as if nothing had been."""

import random

import pytest

from tests.smoke.test_resume import kill_and_resume

TERMS = {
    *("train/loss/autoencoder", "train/loss/discriminator", "train/loss/denoiser"),
    *("train/grad_norm/autoencoder", "train/grad_norm/discriminator", "train/grad_norm/denoiser"),
    *("train/autoencoder/align/repa", "train/align/repa", "train/latent/std_max"),
}


def check(whole, steps):
    names = [row.split(",")[1] for row in whole["rows"]]
    assert all(names.count(term) == steps for term in TERMS)
    assert whole["weights"].keys() == {"trained", "ema", "stage"}  # the norm is among the first two
    assert len(set(whole["adam"])) == 3


def test_one_kill_is_bit_identical_with_three_optimizers(tmp_path):
    words = ["experiment=repa_e_sit_s", "ema.decay=0.9", "callbacks.checkpoint.every=2"]
    check(kill_and_resume(tmp_path, 5, [3], *words), 5)


@pytest.mark.slow
def test_five_kills_are_bit_identical_with_three_optimizers(tmp_path):
    kills = sorted(random.Random(4).sample(range(1, 40), 5))
    check(kill_and_resume(tmp_path, 40, kills, "experiment=repa_e_sit_s", "ema.decay=0.9"), 40)
