"""Runs a composed training in forked children, some of which kill themselves; prints what each left behind.

One process imports Lightning once and forks, because the import costs more than the steps.
Usage: python -m tests.smoke.resume_worker RUNS_FOLDER STEPS KILLS [OVERRIDE ...], with KILLS like 3,17,40
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


def kill_at_step(step: int) -> None:
    """SIGKILL to this process when that step begins: nothing can be tidied up."""

    def hook(self, trainer, pl_module, batch, batch_idx) -> None:
        if pl_module.progress.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.on_train_batch_start = hook


def train(runs: Path, name: str, words: list[str], kill_at: int | None) -> int:
    """One attempt in a child process; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    overrides = [
        "debug=tiny",
        f"run_name={name}",
        f"paths.runs={runs}",
        "callbacks.journal.every=1",
        "callbacks.checkpoint.every=7",
        "~callbacks.sample_grid",
        "logger=csv",
        *words,
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
    for part in sorted({key.split(".")[0] for key in last["state_dict"]}):
        digest = hashlib.sha256()
        for key in sorted(k for k in last["state_dict"] if k.split(".")[0] == part):
            digest.update(last["state_dict"][key].contiguous().numpy().tobytes())
        digests[part] = digest.hexdigest()
    adam = []
    for optimizer in last["optimizer_states"]:
        digest = hashlib.sha256()
        for place, state in sorted(optimizer["state"].items()):
            for key, value in sorted(state.items()):
                digest.update(f"{place} {key}".encode() + value.numpy().tobytes())
        adam.append(digest.hexdigest())
    return {
        "rows": [row for row in rows if "images_per_second" not in row],
        "weights": digests,
        "adam": adam,
        "step": last["progress"]["step"],
    }


def main() -> None:
    runs, kills = Path(sys.argv[1]), [int(step) for step in sys.argv[3].split(",")]
    words = [f"steps={sys.argv[2]}", *sys.argv[4:]]
    statuses = [train(runs, "killed", words, step) for step in kills]
    statuses += [train(runs, "killed", words, None), train(runs, "whole", words, None)]
    folders = {path.parent.name: path.parent for path in runs.rglob("run.json")}
    print(json.dumps({"statuses": statuses, **{name: left_behind(folders[name]) for name in ("killed", "whole")}}))


if __name__ == "__main__":
    main()
