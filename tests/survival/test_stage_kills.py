"""SIGKILL within and between stages: what they leave is, bit by bit, what stages that were never killed leave."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = (
    "experiment=sd3_d24_stages", "debug=tiny", "backbone.depth=2", "backbone.dim=64", "steps=4", "ema.decay=0.9",
    "method.scheduler.warmup=1", "optimizer.lr=0.01", "callbacks.checkpoint.every=2", "callbacks.sample_grid.every=3",
    "callbacks.journal.every=1", "logger=csv", "task.stages.px512.words=['data.image_size=64']",
    "task.stages.px1024.words=['data.image_size=96']",
)  # fmt: skip
KILLS = (
    "01_px256 1:in_the_step", "01_px256 1:half_written", "01_px256 3:after_backward", "01_px256 unmarked",
    "01_px256 marked", "02_px512 0:in_the_step", "02_px512 1:written_not_named", "02_px512 2:drawing",
    "02_px512 3:named", "02_px512 unmarked", "03_px1024 0:after_backward", "03_px1024 1:named",
    "03_px1024 3:half_written", "03_px1024 marked",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fourteen_kills_of_three_stages(tmp_path):
    job = {"folder": str(tmp_path), "words": WORDS, "kills": KILLS}
    command = [sys.executable, "-m", "tests.survival.stage_worker"]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["statuses"] == [-signal.SIGKILL] * len(KILLS) + [0, 0], done.stderr[-2000:]
    killed, whole = result["killed"], result["whole"]
    assert list(killed) == list(whole) == ["01_px256", "02_px512", "03_px1024"]
    for stage, left in whole.items():
        if "3:named" in " ".join(kill for kill in KILLS if stage in kill):
            # Killed when its last checkpoint was there and the last grid was not: the grid alone is missing.
            for name in [name for name in left["pictures"] if name.startswith("step_000004")]:
                assert name not in killed[stage]["pictures"]
                del left["pictures"][name]
        for part, value in left.items():
            assert killed[stage][part] == value, f"{stage}: {part}"
        assert left["step"] == 4 and left["pictures"] and set(left["weights"]) == {"trained", "ema"}
    assert len({left["weights"]["trained"] for left in whole.values()}) == 3
