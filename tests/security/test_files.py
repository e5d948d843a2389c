"""Hostile files: nothing of them runs, nothing is written elsewhere, nothing is asked of a network, one line each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.cases import FAMILIES
from tests.security.watch import PAYLOAD, Watch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("security")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(family, name, outcome, line, events, traces, seconds) of every case, from one process with an audit hook."""
    root = tmp_path_factory.mktemp("hostile")
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.worker", str(root)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "found.json").read_text()), root


def test_more_than_sixty_were_tried(found):
    assert len(found[0]) >= 140
    assert {family for family, *_ in found[0]} == {family.__name__ for family in FAMILIES}


def test_nothing_of_them_ran_or_was_written_elsewhere(found):
    faults = [(family, name, events, traces) for family, name, _, _, events, traces, _ in found[0] if events or traces]
    assert not faults


def test_each_is_refused_with_one_line_or_read_as_data(found):
    for family, name, outcome, line, *_ in found[0]:
        expected = "read" if name.startswith("HARMLESS") else "refused"
        assert outcome == expected, f"{family}: {name}: {outcome} {line}"
        assert outcome == "read" or (line and len(line) < 1500), f"{family}: {name}: {line[:300]}"


def test_none_of_them_keeps_the_reader_busy(found):
    slow = [(name, seconds) for _, name, *_, seconds in found[0] if seconds > 20]  # bombs would take hours
    assert not slow


def test_what_they_hide_is_not_shown(found):
    _, root = found
    for page in (root / "run_folders").rglob("report.html"):
        assert "a secret" not in page.read_text(encoding="utf-8") and "YSBzZWNyZXQ" not in page.read_text(
            encoding="utf-8"
        )


def test_the_hook_sees_what_it_should(tmp_path):
    """The same watch on code that does run, so that an empty list means something."""
    code = f"""
import os, pickle, subprocess, sys
from pathlib import Path
from tests.security.watch import installed
watch = installed()
watch.inside = Path({str(tmp_path / "inside")!r})
os.system("true")
subprocess.run(["true"])
eval(compile("1", "{PAYLOAD}", "eval"))
open({str(tmp_path / "elsewhere")!r}, "w").close()
watch.inside = None
print(" ".join(event.split()[0] for event in watch.events))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert {"os.system", "subprocess.Popen", "exec", "compile", "write"} <= set(done.stdout.split()), done.stderr


def test_the_watch_is_silent_outside_a_case():
    watch = Watch()
    watch("os.system", ("x",))
    assert not watch.events
