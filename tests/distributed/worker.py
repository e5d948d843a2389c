"""Runs composed trainings on several processes each, one training after another; prints what each consumed.

One process imports Lightning once and forks, because the import costs more than the steps. Standard input is a list of
jobs {"folder", "processes", "words", and perhaps "kill", "copy" or "nudge"}; standard output ends with a line of JSON,
one entry per job: exit statuses, samples consumed, and how long after a signal it had left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from callbacks.checkpoint import checkpoints_in
from callbacks.journal import Journal
from callbacks.sharded_checkpoint import remove
from tasks.launch import compose
from tasks.train import run


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def record(file: Path) -> None:
    """Note the samples of every micro-batch when its step begins."""
    begin = Journal.on_train_batch_start

    def hook(self: Any, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        begin(self, trainer, pl_module, batch, batch_idx)
        line = [pl_module.progress.step, batch["serial"].tolist(), batch["index"].tolist()]
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    Journal.on_train_batch_start = hook


def train(job: dict[str, Any], number: int) -> list[int]:
    """One training; returns the exit status of each process."""
    world, port, children = job["processes"], free_port(), []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        if world > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        record(Path(job["folder"]) / f"consumed-{number}-{rank}.jsonl")
        if "kill" in job:
            arm(job["kill"], Path(job["folder"]) / f"signalled-{number}")
        if "nudge" in job:
            nudge(job["nudge"])
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the child ends by os._exit)
        try:
            run(compose([*job["words"], f"trainer.devices={world}", f"paths.runs={job['folder']}"]))
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def arm(kill: str, signalled: Path) -> None:
    """'write:N': SIGKILL to every process in the N-th background write; 'fail:N': the disk is full in that one;
    'SIGNAL:STEP': that signal to the first process, its time into a file."""
    what, number = kill.split(":")
    if what in ("write", "fail"):
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        write, count = HuggingFaceStorageWriter.write_data, [0]

        def torn(self: Any, *arguments: Any) -> Any:
            count[0] += 1
            if count[0] == int(number) and what == "fail":
                raise OSError(errno.ENOSPC, "no space left")
            if count[0] == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, *arguments)

        HuggingFaceStorageWriter.write_data = torn
        return
    begin = Journal.on_train_batch_start

    def hook(self: Any, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        begin(self, trainer, pl_module, batch, batch_idx)
        if pl_module.progress.step == int(number) and trainer.is_global_zero:
            signalled.write_text(str(time.time()))
            os.kill(os.getpid(), getattr(signal, what))

    Journal.on_train_batch_start = hook


def nudge(name: str) -> None:
    """Move every weight of a parameter up by one unit in the last place before the first step."""
    begin = Journal.on_train_batch_start

    def hook(self: Any, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        begin(self, trainer, pl_module, batch, batch_idx)
        if pl_module.progress.step == 0:
            weight = pl_module.get_parameter(name).data
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))

    Journal.on_train_batch_start = hook


def copy(source: Path, folder: Path) -> None:
    """A run's folder as it was after its first checkpoint."""
    shutil.copytree(source, folder)
    for checkpoint in checkpoints_in(next(folder.glob("*/run")))[1:]:
        remove(checkpoint)
    for file in folder.glob("consumed-*"):
        file.unlink()


def main() -> None:
    results = []
    for number, job in enumerate(json.load(sys.stdin)):
        folder = Path(job["folder"])
        if "copy" in job:
            copy(Path(job["copy"]), folder)
        folder.mkdir(parents=True, exist_ok=True)
        statuses, ended = train(job, number), time.time()
        files = sorted(folder.glob(f"consumed-{number}-*.jsonl"))
        lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        signalled = folder / f"signalled-{number}"
        left_after = ended - float(signalled.read_text()) if signalled.exists() else None
        results.append({"statuses": statuses, "consumed": sorted(lines), "left_after": left_after})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
