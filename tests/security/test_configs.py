"""300 mistakes over all recipes: one line that names the key, in time, before anything is imported or built."""

import subprocess
import sys
import time
from functools import lru_cache

import pytest

from tasks import launch as command
from tasks.launch import compose
from tests.conf.test_messages import SECONDS, complain, limit_here
from tests.security.mutations import KINDS, RECIPES, mutants

SEED = 20261129


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    for name in ("IMAGENET", "IMAGES", "CC12M", "COCO", "COCO_CAPTIONS", "PAIRS", "LATENTS"):
        monkeypatch.setenv(f"REPALIGN_{name}", str(tmp_path))
    monkeypatch.setenv("REPALIGN_BASE", __file__)
    monkeypatch.setattr(command, "_run_hydra", lambda argv, sweeping: pytest.fail(f"passed silently: {argv}"))


@lru_cache(2)
def base_of(recipe):
    return compose([f"experiment={recipe}"])


def refused(mutant, folder, capsys):
    """The line with which ``run.py``'s own path refuses a mutant, and the CPU time that took."""
    words = list(mutant.words)
    if mutant.recipe:
        (folder / "experiment").mkdir(exist_ok=True)
        (folder / "experiment" / "mutant.yaml").write_text(mutant.recipe, encoding="utf-8")
        words = ["--config-dir", str(folder), *words]
    before = time.process_time()
    status = command.launch(words)
    seconds = time.process_time() - before
    written = capsys.readouterr()
    lines = [line for line in written.err.splitlines() if line.strip()]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (mutant, written)
    for part in mutant.parts:
        assert part in lines[0], (mutant, lines[0])
    assert len(lines[0]) < 2000 and "\x1b" not in lines[0]
    return lines[0], seconds


def try_all(count, each, folder, capsys):
    faults, times, kinds = [], [], set()
    for mutant in mutants(SEED, count, base_of, each):
        try:
            times.append(refused(mutant, folder, capsys)[1])
            kinds.add(mutant.kind)
        except BaseException as error:  # a mistake that passes, and one that ends in a traceback, are faults alike
            if isinstance(error, KeyboardInterrupt):
                raise
            faults.append(f"{mutant.kind}: {mutant.words} {type(error).__name__}: {str(error)[:600]}")
    assert not faults, f"{len(faults)} of {count}\n" + "\n".join(faults)
    slow = sorted(times)[-1]
    assert slow < SECONDS or slow < limit_here(), f"{slow:.1f} s"
    return kinds


def test_thirty_mistakes_one_of_each_kind(tmp_path, capsys):
    assert len(try_all(30, 6, tmp_path, capsys)) >= 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_hundred_mistakes_over_all_recipes(tmp_path, capsys):
    try_all(len(RECIPES) * 3, 3, tmp_path, capsys)
    assert len(RECIPES) * 3 >= 300


def test_the_generator_is_seeded_and_reaches_every_kind_and_recipe():
    seen = []

    def record(recipe):
        seen.append(recipe)
        return base_of(RECIPES[0])

    first = list(mutants(SEED, len(KINDS), record, 1))
    assert first == list(mutants(SEED, len(KINDS), record, 1))
    count = 3 * len(RECIPES)
    assert {RECIPES[n // 3 % len(RECIPES)] for n in range(count)} == set(RECIPES)
    assert len({number * 7 % len(KINDS) for number in range(len(KINDS))}) == len(KINDS)


@pytest.mark.parametrize("words", [["experiment=demo", "optimizer.lr=${nowhere.x}"], ["experiment=demo", "steps=0"]])
def test_the_same_through_the_command_itself(words):
    complain(*words)


def test_no_flag_reads_a_pickle_or_another_tree():
    for flag in ("--experimental-rerun=x.pkl", "--config-path=/x", "-cp", "--config-pat=/x", "--config-name=x", "-sc"):
        assert flag.split("=")[0] in complain("experiment=demo", flag)


def test_a_good_recipe_from_another_folder_passes(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /backbone: sit_demo\nname: mine\nreference: {fid: 1}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "run.py", "--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job"],
        cwd=command.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "name: mine" in done.stdout, done.stderr
