"""``python -m tests.golden [FOLDER] [--json FILE]``: compare golden cases with the official numbers."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tests.golden import runner


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when no case failed, 1 when one did, 2 when there is no case."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=runner.DATA, help="folder of case folders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the verdicts as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the cases are tiny, and sums do not depend on the machine's number of cores
    runner.load_kinds()
    try:
        folders = runner.find_cases(options.folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    verdicts = runner.run_all(folders, lambda verdict: print(verdict.line(), flush=True))
    counts = {status: sum(v.status == status for v in verdicts) for status in ("PASS", "FAIL", "UNSUPPORTED")}
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed, {counts['UNSUPPORTED']} unsupported")
    if options.json is not None:
        summary = {"passed": counts["PASS"], "failed": counts["FAIL"], "unsupported": counts["UNSUPPORTED"]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        cases = [{key: _strict(value) for key, value in asdict(verdict).items()} for verdict in verdicts]
        options.json.write_text(json.dumps({**summary, "cases": cases}, indent=2) + "\n")
    return 1 if counts["FAIL"] else 0


def _strict(value: object) -> object:
    """JSON has no infinity: say it as a word."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
