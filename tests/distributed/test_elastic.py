"""A run goes on on another number of processes: same samples, none twice or lost, same losses."""

import pytest
import torch

from tests.distributed.runs import DDP, FSDP, farthest, job, trained

pytestmark = pytest.mark.timeout(1800)  # several trainings of several processes, perhaps on few cores

SERIALS = 12
WORDS = (f"data.batch_size={SERIALS}", "callbacks.checkpoint.keep=-1")


def resumed(tmp_path, recipe, before, after, kind, save, steps, other=None):
    """A run of ``steps`` steps on ``before`` processes, and the same from step ``save`` on on each of ``after``."""
    words = (*WORDS, f"callbacks.checkpoint.every={save}", f"steps={steps}")
    jobs = [job(tmp_path / "whole", recipe, before, *kind, *words)]
    for number in after:
        kind_there = (other or kind) if number > 1 else ()
        jobs.append(job(tmp_path / f"on_{number}", recipe, number, *kind_there, *words, copy=str(tmp_path / "whole")))
    whole, *runs = trained(*jobs)
    return whole, runs


def check(whole, runs, save, steps, tolerance=1e-6):
    everything = [pair for pairs in whole.consumed.values() for pair in pairs]
    assert sorted(serial for serial, _ in everything) == list(range(SERIALS * steps))  # none twice, none lost
    for run in runs:
        assert run.consumed == {step: pairs for step, pairs in whole.consumed.items() if step >= save}
        torch.testing.assert_close(run.column("loss"), whole.column("loss"), rtol=tolerance, atol=tolerance)
        print(f"resumed: largest relative difference {relative(run, whole):.1e}")


def relative(run, whole):
    a, b = run.column("loss"), whole.column("loss")
    return float(((a - b).abs() / b.abs()).max())


def test_a_sharded_run_goes_on_on_one_and_three(tmp_path):
    whole, runs = resumed(tmp_path, "repa_sit_s", 2, (1, 3), FSDP, save=2, steps=4)
    check(whole, runs, save=2, steps=4)
    for run in runs:
        assert farthest(run.checkpoint, whole.checkpoint) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["repa_sit_s", "repa_e_sit_s", "sra_sit_b", "ddt_b", "sd3_d15"])
def test_a_run_of_three_goes_on_on_one_and_two(recipe, tmp_path):
    whole, runs = resumed(tmp_path, recipe, 3, (1, 2), DDP, save=5, steps=55)
    # Against a discriminator the rounding of sums over ranks grows by a factor of about 30 in 50 steps.
    check(whole, runs, save=5, steps=55, tolerance=1e-5 if recipe == "repa_e_sit_s" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["repa_sit_s", "sra_sit_b"])
def test_a_sharded_run_goes_on_anywhere(recipe, tmp_path):
    whole, runs = resumed(tmp_path, recipe, 2, (1, 2, 3), FSDP, save=5, steps=55)
    check(whole, runs, save=5, steps=55)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "other"), [(DDP, FSDP), (FSDP, DDP)])
def test_plain_and_sharded_runs_continue_each_other(kind, other, tmp_path):
    whole, runs = resumed(tmp_path, "repa_sit_s", 2, (2, 3), kind, save=2, steps=8, other=other)
    check(whole, runs, save=2, steps=8)
