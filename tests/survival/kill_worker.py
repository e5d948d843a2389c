"""Runs composed trainings in forked children that kill themselves at given moments; prints what each left behind.

One process imports Lightning once and forks, because the import costs more than the steps. Standard input is a list of
jobs {"folder", "words", "kills", "processes"}; standard output ends with a line of JSON, one entry per job.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import callbacks.evaluate
import callbacks.reconstruction_grid
import callbacks.sample_grid
import repalign.encoders.vit  # noqa: F401  (imports timm once, for all children)
from callbacks.checkpoint import checkpoints_in
from callbacks.journal import Journal
from tasks.launch import compose
from tasks.train import run
from tests.distributed.worker import free_port

Due = Callable[[], bool]
# What no second run repeats: clocks, memory, disk.
OF_THE_MACHINE = re.compile("per_second|seconds|hours|system/")


def die(*_: Any, **__: Any) -> None:
    """SIGKILL to this process: nothing can be tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_step(due: Due) -> None:
    """Before anything of the step was computed."""
    begin = Journal.on_train_batch_start

    def hook(self, trainer, pl_module, batch, batch_idx) -> None:
        begin(self, trainer, pl_module, batch, batch_idx)
        if due():
            die()

    Journal.on_train_batch_start = hook


def after_backward(due: Due) -> None:
    """Gradients are there, the (first) optimizer has not moved."""
    Journal.on_before_optimizer_step = lambda self, trainer, pl_module, optimizer: die() if due() else None


def half_written(due: Due) -> None:
    """In the middle of a checkpoint."""
    save = torch.save

    def torn(content: Any, file: Any) -> None:
        if not due():
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    torch.save = torn


def _at_rename(due: Due, before: bool) -> None:
    replace = os.replace

    def hook(source: Any, target: Any) -> None:
        mortal = due() and str(target).endswith(".ckpt")
        if mortal and before:
            die()
        replace(source, target)
        if mortal:
            die()

    os.replace = hook


def written_not_named(due: Due) -> None:
    """The checkpoint is whole, but not yet in its place."""
    _at_rename(due, before=True)


def named(due: Due) -> None:
    """The checkpoint is in its place; nothing after it was done, older ones are still there."""
    _at_rename(due, before=False)


def drawing(due: Due) -> None:
    """While pictures are drawn, for a grid or for scores."""
    for module, name in (
        (callbacks.sample_grid, "generate"),
        (callbacks.evaluate, "generate"),
        (callbacks.reconstruction_grid, "grid_of"),
    ):
        original = getattr(module, name)
        setattr(module, name, lambda *a, original=original, **k: die() if due() else original(*a, **k))


EVERYWHERE = (in_the_step, after_backward)
PLACES = (*EVERYWHERE, half_written, written_not_named, named, drawing)


def arm(kill: str) -> None:
    """Prepare the death 'STEP:PLACE' or, of one run folder, 'FOLDER STEP:PLACE': there, once STEP steps are done."""
    folder, _, moment = kill.rpartition(" ")
    step, place = moment.split(":")
    done = {"steps": -1}
    begin = Journal.on_train_batch_start

    def note(self: Any, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        begin(self, trainer, pl_module, batch, batch_idx)
        done["steps"] = pl_module.progress.step if folder in ("", pl_module.run_dir.name) else -1

    Journal.on_train_batch_start = note
    {p.__name__: p for p in PLACES}[place](lambda: done["steps"] >= int(step))


def train(runs: Path, name: str, words: list[str], kill: str | None, processes: int = 1) -> int:
    """One attempt in child processes; returns the exit status of the one that ended first.

    Of several processes the last dies, or the first where only that one comes by; the others are killed after it, as
    launchers do.
    """
    port, children = free_port(), []
    for rank in range(processes):
        child = os.fork()
        if not child:
            attempt(runs, name, words, kill if kill and dies(kill, rank, processes) else None, rank, processes, port)
        children.append(child)
    first, status = os.waitpid(-1, 0)
    for child in children:
        if child != first:
            if status:
                os.kill(child, signal.SIGKILL)
            _, other = os.waitpid(child, 0)
            status = status or other
    return os.waitstatus_to_exitcode(status)


def dies(kill: str, rank: int, processes: int) -> bool:
    """Whether this process is the one that kills itself: only the first writes checkpoints."""
    return rank == (processes - 1 if kill.split(":")[1] in (p.__name__ for p in EVERYWHERE) else 0)


def attempt(runs: Path, name: str, words: list[str], kill: str | None, rank: int, processes: int, port: int) -> None:
    """One process of a training; does not return."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [
            *words,
            "trainer=ddp",
            "trainer.accelerator=cpu",
            "trainer.precision=32-true",
            f"trainer.devices={processes}",
        ]
    fixed = ["debug=tiny", f"run_name={name}", f"paths.runs={runs}", "callbacks.journal.every=1", "logger=csv"]
    if kill is not None:
        arm(kill)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the child ends by os._exit)
    try:
        run(compose([*fixed, *words]))
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def left_behind(run_dir: Path) -> dict[str, Any]:
    """Logged numbers and scores (times excluded), pictures, and hashes of what the last checkpoint holds."""
    rows = (run_dir / "metrics.csv").read_text().splitlines()[1:]
    last = torch.load(checkpoints_in(run_dir)[-1], weights_only=True)
    weights = {}
    for part in sorted({key.split(".")[0] for key in last["state_dict"]}):
        digest = hashlib.sha256()
        for key in sorted(k for k in last["state_dict"] if k.split(".")[0] == part):
            digest.update(last["state_dict"][key].contiguous().numpy().tobytes())
        weights[part] = digest.hexdigest()
    moments = []
    for optimizer in last["optimizer_states"]:
        digest = hashlib.sha256()
        for place, state in sorted(optimizer["state"].items()):
            for key, value in sorted(state.items()):
                digest.update(f"{place} {key}".encode() + value.numpy().tobytes())
        moments.append(digest.hexdigest())
    return {
        "rows": [row for row in rows if not OF_THE_MACHINE.search(row)],
        "pictures": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run_dir.glob("samples/*.png"))},
        "weights": weights,
        "adam": moments,
        "step": last["progress"]["step"],
        "files": sorted(p.name for p in (run_dir / "checkpoints").iterdir()),
    }


def main() -> None:
    results = []
    for job in json.load(sys.stdin):
        runs, words = Path(job["folder"]), job["words"]
        attempts = [*(("killed", kill) for kill in job["kills"]), ("killed", None), ("whole", None)]
        statuses = [train(runs, name, words, kill, job.get("processes", 1)) for name, kill in attempts]
        folders = {path.parent.name: path.parent for path in runs.rglob("run.json")}
        left = {name: left_behind(folders[name]) for name in ("killed", "whole") if name in folders}
        results.append({"statuses": statuses, **left})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
