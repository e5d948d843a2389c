"""The same global batch on one process and on several gives the same training, whatever is sharded."""

import itertools

import pytest
import torch

from tests.distributed.runs import DDP, FSDP, farthest, job, trained

pytestmark = pytest.mark.timeout(1800)  # several trainings of several processes, perhaps on few cores

METHODS = ("repa_sit_s", "repa_e_sit_s", "sra_sit_b", "ddt_b", "sd3_d15")
BATCH = ("data.batch_size=12",)
DOUBLE = ("trainer.precision=64-true",)
EXACT, CLOSE = 1e-10, 1e-5
# Of weights: Adam divides by the root of moments, some of which are the rounding of gradients here.
ROUNDED = {"repa_e_sit_s": 1e-7}
# Of losses in 50 steps: against a discriminator, rounding grows.
LOUDER = {"repa_e_sit_s": 3e-5}


def equal_losses(found, expected, tolerance):
    """Every logged loss and norm, step by step."""
    for name in ("loss", "grad_norm", "grad_norm/denoiser"):
        a, b = found.column(name), expected.column(name)
        assert len(a) == len(b)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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
@pytest.mark.parametrize("recipe", METHODS)
def test_processes_train_as_one(recipe, processes, tmp_path):
    """float64 to 1e-10 in weights, averages and moments; float32 to 1e-5 in the losses of 50 steps."""
    words = BATCH
    double, one_double, single, one_single = trained(
        job(tmp_path / "a", recipe, processes, *DDP, *words, *DOUBLE, "steps=10"),
        job(tmp_path / "b", recipe, 1, *words, *DOUBLE, "steps=10"),
        job(tmp_path / "c", recipe, processes, *DDP, *words, "steps=50"),
        job(tmp_path / "d", recipe, 1, *words, "steps=50"),
    )
    distance = farthest(double.checkpoint, one_double.checkpoint)
    losses = float((single.column("loss") / one_single.column("loss") - 1).abs().max())
    print(f"| {recipe} | ddp | {processes} | {distance:.1e} | {losses:.1e} |")
    assert distance < ROUNDED.get(recipe, EXACT)
    equal_losses(double, one_double, ROUNDED.get(recipe, EXACT))
    assert losses < LOUDER.get(recipe, CLOSE)
    assert single.consumed == one_single.consumed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("recipe", ["repa_sit_s", "sra_sit_b", "ddt_b", "sd3_d15"])
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
@pytest.mark.parametrize("recipe", METHODS)
def test_dropout_does_not_depend_on_the_process(recipe, tmp_path):
    """Every draw is of (seed, sample, step): dropped conditions, noise and times of a sample are the same anywhere."""
    runs = trained(*(job(tmp_path / str(n), recipe, n, *DDP, *BATCH, "steps=4") for n in (1, 2, 3)))
    for a, b in itertools.pairwise(runs):
        torch.testing.assert_close(a.column("loss"), b.column("loss"), rtol=CLOSE, atol=CLOSE)
        assert a.consumed == b.consumed
