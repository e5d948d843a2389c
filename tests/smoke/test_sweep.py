"""Sweeps as a person runs them: killed and started again, on every local launcher, as a search; and their report."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
WORDS = ("-m", "sweep=coefficient", "debug=tiny", "align.weight=0.1,0.5", "callbacks.evaluate.num_samples=8")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each job imports Lightning


def command(tmp_path: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    places = {
        "REPALIGN_RUNS": str(tmp_path / "runs"),
        "REPALIGN_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return [sys.executable, str(ROOT / "run.py"), *words], {**os.environ, **places}


def start(tmp_path: Path, *words: str) -> str:
    line, environment = command(tmp_path, *words)
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def finished(folder: Path) -> bool:
    return (folder / "job.json").is_file() and json.loads((folder / "job.json").read_text())["finished"]


def steps_of(folder: Path) -> list[int]:
    with open(folder / "metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["name"] == "train/loss"]


def test_a_killed_sweep_goes_on_and_its_report_shows_it(tmp_path):
    words = (*WORDS, "steps=40", "callbacks.checkpoint.every=1", "callbacks.journal.every=1")
    folder = tmp_path / "runs" / "coefficient" / "sweep"
    line, environment = command(tmp_path, *words)
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            # Until the second job has written some checkpoints.
            while not list((folder / "1" / "checkpoints").glob("step_0000001*.ckpt")):
                assert first.poll() is None, (tmp_path / "first.log").read_text()[-2000:]
                time.sleep(0.05)
        finally:
            first.kill()
            first.wait()
    assert finished(folder / "0") and not finished(folder / "1")
    written = (folder / "0" / "metrics.csv").stat().st_mtime_ns
    said = start(tmp_path, *words)
    assert "job 0 is finished, not run again" in said and "job 1 is finished" not in said
    assert "resuming from" in said
    assert (folder / "0" / "metrics.csv").stat().st_mtime_ns == written
    assert finished(folder / "1") and steps_of(folder / "1") == steps_of(folder / "0") == list(range(1, 41))

    start(tmp_path, "task=report", f"task.folder={folder}")
    with open(folder / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["run"], row["step"]) for row in rows] == [
        ("align.weight=0.1", "0", "40"),
        ("align.weight=0.5", "1", "40"),
    ]
    assert all(float(row["fd_lite0"]) > 0 for row in rows)
    assert "| align.weight=0.5 | 1 | 40 |" in (folder / "sweep.md").read_text()
    with Image.open(folder / "sweep.png") as picture:
        assert picture.size > (1000, 400) and len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_run_two_jobs_and_skip_them_the_next_time(launcher, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    start(tmp_path, *WORDS, f"launcher={launcher}")
    folders = [tmp_path / "runs" / "coefficient" / "sweep" / str(number) for number in (0, 1)]
    assert all(finished(folder) and steps_of(folder) for folder in folders)
    times = [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders]
    said = start(tmp_path, *WORDS)  # another launcher, the same jobs
    assert said.count("is finished, not run again") == 2
    assert [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders] == times


def test_a_job_on_two_processes_is_one_job(tmp_path):
    """Lightning's second process joins the job; it does not start the sweep again."""
    words = (*WORDS[:3], "align.weight=0.5", "~callbacks.evaluate", "trainer.devices=2", "trainer.strategy=ddp")
    start(tmp_path, *words)
    folder = tmp_path / "runs" / "coefficient" / "sweep"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0"]
    assert finished(folder / "0") and steps_of(folder / "0") == [2]
    assert start(tmp_path, *words).count("is finished, not run again") == 1


def test_a_search_proposes_the_same_trials_again(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ("-m", "sweep=search", "debug=tiny", "~callbacks.evaluate", "score=train/loss", "callbacks.journal.every=1")
    start(tmp_path, *words, "hydra.sweeper.n_trials=2")
    said = start(tmp_path, *words, "hydra.sweeper.n_trials=3")
    folder = tmp_path / "runs" / "search" / "sweep"
    assert said.count("is finished, not run again") == 2
    assert all(finished(folder / str(number)) for number in range(3))
    weights = [
        json.loads((folder / str(n) / "job.json").read_text())["composition"]["align"]["weight"] for n in range(3)
    ]
    assert len(set(weights)) == 3 and all(0.05 <= weight <= 2 for weight in weights)
    assert "best_value" in (folder / "optimization_results.yaml").read_text()


def test_a_job_that_fails_leaves_the_others_and_ends_the_sweep_with_its_line(tmp_path):
    start(tmp_path, *WORDS)
    line, environment = command(tmp_path, *WORDS, "optimizer.lr=0.1")
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: job ")]
    assert [line.split(" ")[2] for line in lines] == ["0", "1", "0"]  # as they fail, and the first at the end
    assert all("optimizer.lr was 0.001, is 0.1" in line for line in lines)
