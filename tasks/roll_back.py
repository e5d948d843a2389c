"""Going back to before a collapse, and on from there with other noise."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from callbacks.checkpoint import checkpoints_in, step_of
from callbacks.guard import Collapsed
from repalign.errors import UserError
from repalign.folders import write_text
from repalign.seals import seal_of

RECORD = "roll_backs.json"
MOST = 3  # a fourth collapse is no accident
SEED_STEP = 1_000_003  # between the seeds of two attempts: far apart, so that sweeps over small seeds never meet them


def roll_backs(run_dir: Path) -> list[dict[str, Any]]:
    """What was rolled back in this run so far, oldest first."""
    path = run_dir / RECORD
    if not path.is_file():
        return []
    try:
        held = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"'{path}' cannot be read ({type(error).__name__}); remove it, or choose another run_name"
        ) from error
    if not (isinstance(held, list) and all(isinstance(entry, dict) for entry in held)):
        raise UserError(f"'{path}' is no list of roll-backs; remove it, or choose another run_name")
    return held


def seed_after(done: list[dict[str, Any]], seed: int) -> int:
    """Seed of the draws after so many roll-backs: the same noise would lead to the same end."""
    return seed + SEED_STEP * len(done)


def roll_back(collapse: Collapsed, run_dir: Path, seed: int) -> None:
    """Set aside the checkpoints from the collapse on and note it, so that the newest one left is a good one.

    Afterwards the run continues in this process; of several processes every one stops and the same command goes on.

    Raises:
        Collapsed: when the policy is to stop, no good checkpoint is left, or it has happened too often.
        UserError: when there are several processes.
    """
    done = roll_backs(run_dir)
    if collapse.policy != "roll_back" or collapse.good is None or len(done) >= MOST:
        raise collapse
    _set_aside(collapse, run_dir, done)
    print(
        f"{collapse}\nrolled back to {collapse.good}; seed of the draws {seed_after(roll_backs(run_dir), seed)}",
        flush=True,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"rolled back to {collapse.good}: start the same command again, all processes go on from there")


@rank_zero_only
def _set_aside(collapse: Collapsed, run_dir: Path, done: list[dict[str, Any]]) -> None:
    for path in checkpoints_in(run_dir):
        if step_of(path) >= collapse.since:
            path.rename(path.with_suffix(".ckpt.collapsed"))
            seal_of(path).unlink(missing_ok=True)
    assert collapse.good is not None
    entry = {"noticed": collapse.step, "since": collapse.since, "to": step_of(collapse.good), "why": str(collapse)}
    write_text(run_dir / RECORD, json.dumps([*done, entry], indent=1))
