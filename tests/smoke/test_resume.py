import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kill_and_resume(tmp_path: Path, steps: int, kills: list[int], *words: str) -> dict:
    """What the resumed run left behind, after it was found equal to the uninterrupted one."""
    command = [sys.executable, "-m", "tests.smoke.resume_worker", str(tmp_path), str(steps), ",".join(map(str, kills))]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["statuses"] == [-signal.SIGKILL] * len(kills) + [0, 0], done.stderr[-2000:]
    killed, whole = result["killed"], result["whole"]
    assert whole["step"] == steps
    assert killed["rows"] == whole["rows"]
    for part in ("weights", "adam", "step"):
        assert killed[part] == whole[part], part
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_five_random_steps_is_bit_identical(workers, tmp_path):
    kills = sorted(random.Random(workers).sample(range(1, 60), 5))
    words = ["experiment=repa_sit_s", f"data.num_workers={workers}", "ema.decay=0.9"]
    whole = kill_and_resume(tmp_path, 60, kills, *words)
    names = {row.split(",")[1] for row in whole["rows"]}
    assert {"train/loss", "train/grad_norm", "train/align/repa", "train/lr"} <= names
    assert whole["weights"].keys() == {"trained", "ema"}


@pytest.mark.slow
def test_a_killed_first_stage_is_bit_identical_with_both_optimizers(tmp_path):
    """The discriminator joins at step 3; the checkpoints are every 7 steps."""
    words = [
        "experiment=ldm_first_stage_vq_f4",
        "objective.adversarial.start=3",
        "objective.adversarial.discriminator.layers=1",
        "~callbacks.reconstruction_scores",
    ]
    whole = kill_and_resume(tmp_path, 16, [2, 9], *words)
    names = [row.split(",")[1] for row in whole["rows"]]
    assert names.count("train/loss/autoencoder") == 16 and names.count("train/loss/discriminator") == 13
    assert {"train/adversarial_weight", "train/perplexity", "train/grad_norm/discriminator"} <= set(names)
    assert whole["weights"].keys() == {"autoencoder", "discriminator"} and len(whole["adam"]) == 2
