"""Trainings on several processes, and what they left behind."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from callbacks.checkpoint import checkpoints_in, read_checkpoint

ROOT = Path(__file__).parents[2]
CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true")
FSDP = ("trainer=fsdp", *CPU)
DDP = ("trainer=ddp", *CPU)
COMMON = ("debug=tiny", "logger=csv", "run_name=run", "callbacks.journal.every=1", "ema.decay=0.9")


@dataclass
class Run:
    """A finished training: its numbers by name, its samples by step, its last checkpoint as an ordinary one.

    ``left_after``: seconds until all processes had left after one was told to.
    """

    folder: Path
    statuses: list[int]
    consumed: dict[int, list[tuple[int, int]]]
    left_after: float | None

    def column(self, name: str) -> torch.Tensor:
        with open(self.folder / "metrics.csv", newline="") as file:
            rows = [(int(r["step"]), float(r["value"])) for r in csv.DictReader(file) if r["name"] == f"train/{name}"]
        return torch.tensor([value for _, value in sorted(dict(rows).items())], dtype=torch.float64)

    @property
    def checkpoint(self) -> dict[str, Any]:
        return read_checkpoint(checkpoints_in(self.folder)[-1])


def job(folder: Path, recipe: str, processes: int, *words: str, **how: Any) -> dict[str, Any]:
    """One training of a recipe; the last word of a key wins.

    Args:
        folder: of its runs.
        recipe: name of the experiment.
        processes: how many share it.
        words: of the command line.
        how: ``kill`` (:func:`tests.distributed.worker.arm`), ``copy`` (folder of a run to continue from its first
            checkpoint), ``nudge`` (:func:`tests.distributed.worker.nudge`).
    """
    named = {word.split("=")[0]: word for word in (*COMMON, f"experiment={recipe}", *words)}
    return {"folder": str(folder), "processes": processes, "words": list(named.values()), **how}


def trained(*jobs: dict[str, Any], fails: bool = False) -> list[Run]:
    """Run the trainings one after the other."""
    command = [sys.executable, "-m", "tests.distributed.worker"]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = []
    for entry, result in zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert fails or set(result["statuses"]) == {0} or "kill" in entry, (entry["words"], done.stderr[-3000:])
        consumed: dict[int, list[tuple[int, int]]] = {}
        for step, serials, indices in result["consumed"]:
            consumed.setdefault(step, []).extend(zip(serials, indices, strict=True))
        found = sorted(Path(entry["folder"]).glob("*/run"))
        folder = found[0] if found else Path(entry["folder"])
        consumed = {step: sorted(pairs) for step, pairs in consumed.items()}
        runs.append(Run(folder, result["statuses"], consumed, result["left_after"]))
    return runs


def farthest(a: Any, b: Any) -> float:
    """The largest difference between two checkpoints' weights, averages and moments of optimizers."""
    worst = 0.0
    for left, right in ((a["state_dict"], b["state_dict"]), *zip(_moments(a), _moments(b), strict=True)):
        assert left.keys() == right.keys()
        for key in left:
            worst = max(worst, float((left[key].double() - right[key].double()).abs().max().nan_to_num(1e9)))
    return worst


def _moments(checkpoint: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    return [
        {f"{place}.{key}": value for place, state in saved["state"].items() for key, value in state.items()}
        for saved in checkpoint["optimizer_states"]
    ]
