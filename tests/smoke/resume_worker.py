"""Runs a composed training in forked children, some of which kill themselves; prints what each left behind.

One process imports Lightning once and forks, because the import costs more than the 60 steps.
Usage: python -m tests.smoke.resume_worker RUNS_FOLDER WORKERS KILL_STEP [KILL_STEP ...]
"""

import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from callbacks.checkpoint import checkpoints_in
from callbacks.journal import Journal
from tasks.launch import compose
from tasks.train import run

STEPS = 60


def kill_at_step(step: int) -> None:
    """SIGKILL to this process when that step begins: nothing can be tidied up."""

    def hook(self, trainer, pl_module, batch, batch_idx) -> None:
        if pl_module.progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.on_train_batch_start = hook


def train(runs: Path, name: str, workers: int, kill_at: int | None) -> int:
    """One attempt in a child process; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    overrides = [
        "experiment=repa_sit_s",
        "debug=tiny",
        f"steps={STEPS}",
        f"run_name={name}",
        f"paths.runs={runs}",
        f"data.num_workers={workers}",
        "callbacks.journal.every=1",
        "callbacks.checkpoint.every=7",
        "ema.decay=0.9",
        "~callbacks.sample_grid",
        "logger=csv",
    ]
    if kill_at is not None:
        kill_at_step(kill_at)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the child ends by os._exit)
    try:
        run(compose(overrides))
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def left_behind(run_dir: Path) -> dict[str, object]:
    """Logged numbers (times excluded) and hashes of what the last checkpoint holds."""
    rows = (run_dir / "metrics.csv").read_text().splitlines()[1:]
    last = torch.load(checkpoints_in(run_dir)[-1], weights_only=True)
    digests = {}
    for part in ("trained.", "ema."):
        digest = hashlib.sha256()
        for key in sorted(k for k in last["state_dict"] if k.startswith(part)):
            digest.update(last["state_dict"][key].contiguous().numpy().tobytes())
        digests[part] = digest.hexdigest()
    moments = hashlib.sha256()
    for _, state in sorted(last["optimizer_states"][0]["state"].items()):
        moments.update(state["exp_avg"].numpy().tobytes() + state["exp_avg_sq"].numpy().tobytes())
    return {
        "rows": [row for row in rows if "images_per_second" not in row],
        **digests,
        "adam": moments.hexdigest(),
        "step": last["progress"]["step"],
    }


def main() -> None:
    runs, workers, kills = Path(sys.argv[1]), int(sys.argv[2]), [int(step) for step in sys.argv[3:]]
    statuses = [train(runs, "killed", workers, step) for step in kills]
    statuses += [train(runs, "killed", workers, None), train(runs, "whole", workers, None)]
    folders = {path.parent.name: path.parent for path in runs.rglob("run.json")}
    print(json.dumps({"statuses": statuses, **{name: left_behind(folders[name]) for name in ("killed", "whole")}}))


if __name__ == "__main__":
    main()
