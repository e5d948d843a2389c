"""The files of the tutorial, in a copy of the project: they are in style, their test passes, the recipe trains."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COPIED = ("repalign", "lightning_modules", "datamodules", "callbacks", "tasks", "conf", "assets")

# One process for both: importing torch twice would be half of the time.
RUN = """
import sys, pytest
failed = pytest.main(["-q", "tests/aligners/test_spatial.py"])
from tasks.launch import launch
words = ["experiment=spatial_sit_s", "debug=tiny", "run_name=first", "callbacks.journal.every=1"]
refused = launch([*words, "aligner=repa", "run_name=refused"])
sys.exit(failed or launch(words) or refused - 2)
"""


@pytest.mark.slow
def test_the_tutorial_makes_a_method_that_trains(tmp_path):
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    files = BLOCK.findall((ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8"))
    assert len(files) == 6
    for name, text in files:
        assert not (ROOT / name).exists(), f"{name} is in the project already"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    written = [name for name, _ in files if name.endswith(".py")]
    for words in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *words, "--no-cache", *written], cwd=tmp_path, check=True)
    script = tmp_path / "tutorial.py"
    script.write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "REPALIGN_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "set aligner=spatial" in done.stderr  # the door refuses plain REPA
    with open(tmp_path / "runs/spatial_sit_s/first/metrics.csv", newline="") as file:
        terms = [float(row["value"]) for row in csv.DictReader(file) if row["name"] == "train/align/spatial"]
    assert len(terms) == 2
