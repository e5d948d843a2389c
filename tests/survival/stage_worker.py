"""Runs ``task=stages`` in forked children that kill themselves; prints what each stage of each attempt left behind.

Standard input: {"folder", "words", "kills"}; a kill is 'STAGE STEP:PLACE', or 'STAGE unmarked' and 'STAGE marked' for
the moments before and after a stage is noted as finished.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import repalign.encoders.vit  # noqa: F401  (imports timm once, for all children)
from tasks import jobs, stages
from tasks.check import check_composition
from tasks.launch import compose
from tests.survival.kill_worker import arm, die, left_behind


def prepare(kill: str) -> None:
    """The death at the first such place of that stage."""
    stage, moment = kill.split(" ")
    if moment not in ("unmarked", "marked"):
        return arm(kill)
    mark = jobs.mark

    def hook(cfg: Any, *, finished: bool) -> None:
        ends = finished and Path(cfg.run_dir).name == stage
        if ends and moment == "unmarked":
            die()
        mark(cfg, finished=finished)
        if ends:
            die()

    jobs.mark = hook


def attempt(words: list[str], kill: str | None) -> int:
    """One command in a child process; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (the child ends by os._exit)
    try:
        if kill is not None:
            prepare(kill)
        cfg = compose(words)
        cfg.overrides = words
        check_composition(cfg)
        stages.run(cfg)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    job = json.load(sys.stdin)
    folder, left, statuses = Path(job["folder"]), {}, []
    for name, kills in (("killed", [*job["kills"], None]), ("whole", [None])):
        words = [*job["words"], f"run_dir={folder / name}", f"paths.cache={folder / 'cache'}"]
        statuses += [attempt(words, kill) for kill in kills]
        left[name] = {path.parent.name: left_behind(path.parent) for path in sorted((folder / name).glob("*/run.json"))}
    print(json.dumps({"statuses": statuses, **left}))


if __name__ == "__main__":
    main()
