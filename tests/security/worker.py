"""Reads every hostile file under an audit hook and writes what happened; test_files.py runs it in its own process."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from tests.security.cases import FAMILIES
from tests.security.watch import PAYLOAD, installed


def main(root: Path) -> None:
    from repalign.errors import UserError

    os.environ["REPALIGN_ROOT"] = os.getcwd()
    warnings.simplefilter("ignore")
    watch, found = installed(), []
    for family in FAMILIES:
        folder = root / family.__name__
        folder.mkdir()
        for name, read in family(folder):
            watch.inside, watch.events = folder, []
            began, outcome, line = time.process_time(), "read", ""
            try:
                read()
            except UserError as error:
                outcome, line = "refused", " ".join(str(error).split())
            except BaseException as error:
                outcome, line = (
                    "fault",
                    "".join(traceback.format_exception_only(error))
                    + "".join(traceback.format_tb(error.__traceback__)[-3:]),
                )
            watch.inside = None
            traces = [str(p) for p in root.rglob(PAYLOAD)] + ([PAYLOAD] if PAYLOAD in sys.modules else [])
            seconds = time.process_time() - began
            found.append([family.__name__, name, outcome, line, watch.events, traces, seconds])
    (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
