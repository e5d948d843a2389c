"""A signal ends a run after its step: with a checkpoint, on every process, and with a status that says so."""

import signal
import stat
import subprocess

import pytest

import callbacks.preemption
from callbacks.checkpoint import checkpoints_in, step_of
from callbacks.preemption import Preemption
from repalign.errors import UserError
from tests.distributed.runs import DDP, FSDP, job, trained

pytestmark = pytest.mark.timeout(1800)  # several trainings of several processes, perhaps on few cores

WORDS = (
    "data.batch_size=12",
    "~callbacks.sample_grid",
    "callbacks.preemption.every=1",
    "callbacks.checkpoint.every=100",
)


def test_sigterm_leaves_a_whole_checkpoint(tmp_path):
    """One of two processes gets it; the run goes on as if it had never stopped."""
    words = (*DDP, *WORDS, "steps=5")
    stopped, resumed, whole = trained(
        job(tmp_path / "a", "repa_sit_s", 2, *words, kill="SIGTERM:1"),
        job(tmp_path / "a", "repa_sit_s", 2, *words),
        job(tmp_path / "b", "repa_sit_s", 2, *words),
    )
    assert stopped.statuses == [128 + signal.SIGTERM] * 2
    assert stopped.left_after < 10  # the steps here take less than one
    assert resumed.statuses == [0, 0]
    assert [step_of(p) for p in checkpoints_in(resumed.folder)] == [2, 5]
    assert resumed.column("loss").equal(whole.column("loss"))


@pytest.mark.slow
def test_sigusr1_waits_for_a_write_in_the_background(tmp_path):
    (stopped,) = trained(job(tmp_path, "repa_sit_s", 2, *FSDP, *WORDS, "steps=5", kill="SIGUSR1:2"))
    assert stopped.statuses == [128 + signal.SIGUSR1] * 2
    assert stopped.left_after < 10
    assert [step_of(p) for p in checkpoints_in(stopped.folder)] == [3]
    assert stopped.checkpoint["progress"]["step"] == 3


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        ({"SLURM_JOB_ID": "17"}, "requeue 17"),
        ({"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 17_3"),
        ({}, None),
    ],
)
def test_a_job_goes_back_into_the_queue_under_its_own_number(names, asked, tmp_path, monkeypatch):
    said = tmp_path / "said"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {said}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run
    monkeypatch.setattr(
        callbacks.preemption.subprocess, "run", lambda words, **k: run([str(tmp_path / words[0]), *words[1:]], **k)
    )
    callbacks.preemption._requeue()
    assert (said.read_text().strip() if said.exists() else None) == asked


def test_what_is_no_number_of_a_job_is_not_handed_on(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1; rm")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    with pytest.raises(UserError, match="SLURM_JOB_ID"):
        callbacks.preemption._requeue()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"signals": ["SIGTERN"]}, "SIGTERM"),
        ({"requeue": ["SIGKILL"]}, "requeue"),
        ({"every": 0}, "every"),
    ],
)
def test_options(options, line):
    with pytest.raises(UserError, match=line):
        Preemption(**options)
