"""Seconds of each phase of a round."""

import pytest

from repalign.errors import UserError
from tests.smoke.test_recipes_train import column, train


def test_every_phase_is_timed_and_the_parts_make_the_round(tmp_path, capsys):
    run = train(tmp_path, "experiment=repa_e_sit_s", "callbacks=phases", "callbacks.phase_times.every=2", "steps=5")
    names = ("shared", "autoencoder", "discriminator", "denoiser", "average")
    for name in names:
        assert len(column(run, f"throughput/phase_seconds/{name}")) == 3  # rounds 2, 3-4, 5
        assert min(column(run, f"throughput/phase_seconds/{name}")) > 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("seconds per round over 4"))
    numbers = [float(word.split()[-1]) for word in line.split(": ")[1].replace("=", ",").split(",")]
    assert len(numbers) == 1 + len(names) and sum(numbers[1:]) == pytest.approx(numbers[0], rel=0.02)


def test_a_method_of_one_phase_is_refused(tmp_path):
    with pytest.raises(UserError, match="Generative trains in one phase; leave it out by ~callbacks.phase_times"):
        train(tmp_path, "experiment=sit_s", "callbacks=phases", "method=generative")
