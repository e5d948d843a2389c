import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_five_random_steps_is_bit_identical(workers, tmp_path):
    kills = sorted(random.Random(workers).sample(range(1, 60), 5))
    done = subprocess.run(
        [sys.executable, "-m", "tests.smoke.resume_worker", str(tmp_path), str(workers), *map(str, kills)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["statuses"] == [-signal.SIGKILL] * 5 + [0, 0], done.stderr[-2000:]
    killed, whole = result["killed"], result["whole"]
    assert whole["step"] == 60
    names = {row.split(",")[1] for row in whole["rows"]}
    assert {"train/loss", "train/grad_norm", "train/align/repa", "train/lr"} <= names
    assert killed["rows"] == whole["rows"]
    for part in ("trained.", "ema.", "adam", "step"):
        assert killed[part] == whole[part], part
