"""SIGKILL at any moment: a resumed run is bit-identical to one that was never killed.

Compared are every logged number (losses, gradient norms, learning rate, scores), every picture, the names of the
checkpoints, and SHA-256 of weights, averages and optimizer moments.
"""

import pytest

from tests.survival.kills import kill_and_resume, moments

SHORT = ("ema.decay=0.9", "callbacks.checkpoint.every=2", "callbacks.sample_grid.every=3")
LATE_GAN = ("objective.adversarial.start=3", "objective.adversarial.discriminator.layers=1")
METHODS = {
    "repa_sit_s": SHORT,
    "repa_e_sit_s": SHORT,
    "sra_sit_b": SHORT,
    "ddt_b": SHORT,
    "sd3_d15": SHORT,
    "ldm_first_stage_vq_f4": ("callbacks.checkpoint.every=2", "~callbacks.reconstruction_scores", *LATE_GAN),
}
TERMS = {  # that must be among the compared numbers
    "repa_sit_s": {"train/align/repa", "train/lr", "train/grad_norm", "train/skipped_steps"},
    "repa_e_sit_s": {
        *(
            f"train/{kind}/{phase}"
            for kind in ("loss", "grad_norm")
            for phase in ("autoencoder", "discriminator", "denoiser")
        ),
        *("train/autoencoder/align/repa", "train/latent/std_max"),
    },
    "sra_sit_b": {"train/align/sra"},
    "ddt_b": {"train/loss"},
    "sd3_d15": {"train/loss"},
    "ldm_first_stage_vq_f4": {"train/adversarial_weight", "train/perplexity", "train/grad_norm/discriminator"},
}
OPTIMIZERS = {"repa_e_sit_s": 3, "ldm_first_stage_vq_f4": 2}


def job(folder, name, steps, kills, *words):
    return {"folder": str(folder / name), "words": [f"experiment={name}", f"steps={steps}", *words], "kills": kills}


def check(name, whole, steps):
    names = {row.split(",")[1] for row in whole["rows"]}
    assert names >= {*TERMS[name], "throughput/flops"} and whole["step"] == steps
    assert len(set(whole["adam"])) == OPTIMIZERS.get(name, 1)
    assert any(key in whole["weights"] for key in ("ema", "autoencoder"))


@pytest.mark.timeout(900)
def test_every_method_survives_a_kill(tmp_path):
    """The short form: each method once, each at another place."""
    kills = moments(len(METHODS), 7, seed=0)
    places = dict(zip(METHODS, [kill.split(":")[1] for kill in kills], strict=True))
    jobs = []
    for name, words in METHODS.items():
        if places[name] != "drawing" and "callbacks.sample_grid.every=3" in words:
            words = (*words[:-1], "~callbacks.sample_grid")
        jobs.append(job(tmp_path, name, 6, [f"3:{places[name]}"], *words))
    for name, whole in zip(METHODS, kill_and_resume(jobs), strict=True):
        check(name, whole, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_twenty_kills_of_a_long_run(workers, tmp_path):
    words = (
        "ema.decay=0.9",
        "callbacks.checkpoint.every=7",
        "callbacks.sample_grid.every=50",
        f"data.num_workers={workers}",
    )
    (whole,) = kill_and_resume([job(tmp_path, "repa_sit_s", 400, moments(20, 349, seed=workers), *words)])
    check("repa_sit_s", whole, 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["repa_sit_s", "repa_e_sit_s"])
def test_ten_kills_of_two_processes(name, tmp_path):
    """One process is killed, the other after it; with REPA-E, batch norm and three optimizers are shared."""
    words = ("ema.decay=0.9", "callbacks.checkpoint.every=4", "callbacks.sample_grid.every=20", "data.batch_size=12")
    kills = moments(10, 55, seed=3)
    (whole,) = kill_and_resume([{**job(tmp_path, name, 60, kills, *words), "processes": 2}])
    check(name, whole, 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", METHODS)
def test_five_kills_of_scored_trainings_of_every_method(name, tmp_path):
    """With scores drawn in between, which are compared as well."""
    first_stage = "first_stage" in name
    longer = [w for w in METHODS[name] if not w.startswith(("callbacks.checkpoint", "callbacks.sample_grid"))]
    words = ["callbacks.checkpoint.every=4", *longer]
    if not first_stage:
        words += ["callbacks=evaluation", "callbacks.evaluate.every=10", "callbacks.sample_grid.every=10"]
    kills = moments(5, 29, seed=list(METHODS).index(name))
    (whole,) = kill_and_resume([job(tmp_path, name, 40, kills, *words)])
    check(name, whole, 40)
