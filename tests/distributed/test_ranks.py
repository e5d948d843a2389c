"""The same global batch on one process and on several gives the same training, whatever is sharded."""

import itertools

import pytest
import torch

from tests.distributed.runs import DDP, FSDP, farthest, job, trained

pytestmark = pytest.mark.timeout(1800)  # several trainings of several processes, perhaps on few cores

FROZEN = ("repa_sit_s", "sra_sit_b", "ddt_b", "sd3_d15")  # their autoencoder stands still
BATCH = ("data.batch_size=12",)
DOUBLE = ("trainer.precision=64-true",)
EXACT, CLOSE, LOUD = 1e-10, 1e-5, 3e-5
LONG, NO_GAN = (*BATCH, "steps=50"), ("ablation=repa_e_no_gan",)


def equal_losses(found, expected, tolerance):
    """Every logged loss and norm, step by step."""
    for name in ("loss", "grad_norm", "grad_norm/denoiser"):
        a, b = found.column(name), expected.column(name)
        assert len(a) == len(b)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def apart(found, expected):
    """Relative difference of the losses, step by step."""
    return (found.column("loss") / expected.column("loss") - 1).abs()


def test_two_processes_train_as_one(tmp_path):
    """REPA: two processes, plain and sharded, with two micro-batches each, against one in one go."""
    words = (*BATCH, "steps=3", "callbacks.checkpoint.every=2", "~callbacks.sample_grid")
    alone, shared, sharded = trained(
        job(tmp_path / "one", "repa_sit_s", 1, *words),
        job(tmp_path / "ddp", "repa_sit_s", 2, *DDP, *words, "data.accumulate=2"),
        job(tmp_path / "fsdp", "repa_sit_s", 2, *FSDP, *words, "data.accumulate=2"),
    )
    for run in (shared, sharded):
        equal_losses(run, alone, CLOSE)
        assert run.consumed == alone.consumed
        assert farthest(run.checkpoint, alone.checkpoint) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("recipe", FROZEN)
def test_processes_train_as_one(recipe, processes, tmp_path):
    """50 steps: float64 to 1e-10 in weights, averages and moments; float32 to 1e-5 in losses."""
    double, one_double, single, one_single = trained(
        job(tmp_path / "a", recipe, processes, *DDP, *LONG, *DOUBLE),
        job(tmp_path / "b", recipe, 1, *LONG, *DOUBLE),
        job(tmp_path / "c", recipe, processes, *DDP, *LONG),
        job(tmp_path / "d", recipe, 1, *LONG),
    )
    distance = farthest(double.checkpoint, one_double.checkpoint)
    losses = float(apart(single, one_single).max())
    print(f"| {recipe} | ddp | {processes} | {distance:.1e} | {losses:.1e} |")
    assert distance < EXACT
    equal_losses(double, one_double, EXACT)
    assert losses < CLOSE
    assert single.consumed == one_single.consumed


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """REPA-E on one process: float64, without a discriminator, as it is, and as it is after a nudge of one layer."""
    folder, recipe = tmp_path_factory.mktemp("alone"), "repa_e_sit_s"
    return trained(
        job(folder / "a", recipe, 1, *LONG, *DOUBLE),
        job(folder / "b", recipe, 1, *LONG, *NO_GAN),
        job(folder / "c", recipe, 1, *LONG),
        job(folder / "d", recipe, 1, *LONG, nudge="stage.discriminator.main.0.weight"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_an_autoencoder_as_one(processes, alone, tmp_path):
    """REPA-E, 50 steps: float64 to 1e-10 in weights, averages and moments, float32 to 1e-5 in losses without a
    discriminator. Against one, float32 losses agree to 1e-6 for 20 steps; then rounding grows, in a single process too:
    the one whose discriminator begins one unit in the last place away is further off than several without any."""
    recipe, (one_double, one_plain, one_single, nudged) = "repa_e_sit_s", alone
    double, plain, single = trained(
        job(tmp_path / "a", recipe, processes, *DDP, *LONG, *DOUBLE),
        job(tmp_path / "b", recipe, processes, *DDP, *LONG, *NO_GAN),
        job(tmp_path / "c", recipe, processes, *DDP, *LONG),
    )
    distance, calm = farthest(double.checkpoint, one_double.checkpoint), apart(plain, one_plain)
    losses, rounding = apart(single, one_single), apart(nudged, one_single)
    print(f"| {recipe} | ddp | {processes} | {distance:.1e} | {losses.max():.1e} |", end=" ")
    print(f"without discriminator {calm.max():.1e}, nudged {rounding.max():.1e}")
    assert distance < EXACT
    equal_losses(double, one_double, EXACT)
    assert calm.max() < CLOSE
    assert losses[:20].max() < CLOSE / 10
    assert losses.max() < LOUD
    assert rounding.max() > calm.max()
    assert single.consumed == one_single.consumed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("recipe", FROZEN)
def test_sharded_processes_train_as_plain_ones(recipe, processes, tmp_path):
    words = (*BATCH, "steps=50")
    sharded, plain = trained(
        job(tmp_path / "a", recipe, processes, *FSDP, *words), job(tmp_path / "b", recipe, processes, *DDP, *words)
    )
    losses = float((sharded.column("loss") - plain.column("loss")).abs().max())
    weights = farthest(sharded.checkpoint, plain.checkpoint)
    print(f"| {recipe} | fsdp against ddp | {processes} | {weights:.1e} | {losses:.1e} |")
    assert losses < CLOSE
    assert sharded.consumed == plain.consumed


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*FROZEN, "repa_e_sit_s"])
def test_dropout_does_not_depend_on_the_process(recipe, tmp_path):
    """Every draw is of (seed, sample, step): dropped conditions, noise and times of a sample are the same anywhere."""
    runs = trained(*(job(tmp_path / str(n), recipe, n, *DDP, *BATCH, "steps=4") for n in (1, 2, 3)))
    for a, b in itertools.pairwise(runs):
        torch.testing.assert_close(a.column("loss"), b.column("loss"), rtol=CLOSE, atol=CLOSE)
        assert a.consumed == b.consumed
