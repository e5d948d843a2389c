"""Kill a training, go on, and compare with one that was never killed."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.survival.kill_worker import PLACES

ROOT = Path(__file__).parents[2]


def moments(count: int, steps: int, seed: int, places: tuple[str, ...] = ()) -> list[str]:
    """Random moments 'STEP:PLACE' in the order of their steps; every place as often as another."""
    rng = random.Random(seed)
    chosen = [(places or tuple(p.__name__ for p in PLACES))[n % len(places or PLACES)] for n in range(count)]
    rng.shuffle(chosen)
    return [f"{step}:{place}" for step, place in zip(sorted(rng.sample(range(1, steps), count)), chosen, strict=True)]


def kill_and_resume(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each job's uninterrupted run left behind, after the killed and resumed one was found equal to it."""
    command = [sys.executable, "-m", "tests.survival.kill_worker"]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    for job, result in zip(jobs, results, strict=True):
        what = f"{job['words'][0]} {job['kills']}"
        assert result["statuses"] == [-signal.SIGKILL] * len(job["kills"]) + [0, 0], (what, done.stderr[-2000:])
        killed, whole = result["killed"], result["whole"]
        for part in ("rows", "pictures", "weights", "adam", "step", "files"):
            assert killed[part] == whole[part], f"{what}: {part}"
    return [result["whole"] for result in results]
