"""task=probe on trained run folders: with and without an encoder in the recipe, and with further streams."""

import csv
from pathlib import Path

import pytest

from repalign.errors import UserError
from tasks import probe, train
from tasks.launch import compose


def words(tmp_path: Path, recipe: str) -> list[str]:
    return [
        f"experiment={recipe}",
        "debug=tiny",
        f"paths.runs={tmp_path}",
        f"paths.cache={tmp_path}/cache",
        "run_name=a",
    ]


@pytest.mark.parametrize("recipe", ["family_none", "family_redi"])
def test_every_tap_has_a_value_and_the_file_holds_them(recipe, tmp_path, capsys):
    train.run(compose([*words(tmp_path, recipe), "~callbacks.evaluate", "~callbacks.sample_grid"]))
    cfg = compose([*words(tmp_path, recipe), "task=probe", "task.pictures=32", "task.batch_size=10"])
    probe.run(cfg)
    assert "6 taps" in capsys.readouterr().out
    with open(cfg.task.output, newline="") as file:
        found = {row["tap"]: float(row["cknna"]) for row in csv.DictReader(file)}
    assert list(found) == [f"block.{k}" for k in range(1, 7)]
    assert all(-1 <= value <= 1 for value in found.values())
    # The size of the batches changes nothing; another tap list gives the same number.
    alone = probe.probe(compose([*words(tmp_path, recipe), "task=probe", "task.pictures=32", "task.taps=[block.3]"]))
    assert alone["block.3"] == pytest.approx(found["block.3"], abs=1e-4)
    with pytest.raises(UserError, match="task.taps: unknown tap of this backbone 'block.9'"):
        probe.probe(compose([*words(tmp_path, recipe), "task=probe", "task.taps=[block.9]"]))


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="task.encoder: unknown encoder"):
        probe.probe(compose([*words(tmp_path, "family_none"), "task=probe", "task.encoder=mian"]))
    with pytest.raises(UserError, match="task.pictures: expected 1 or more"):
        probe.probe(compose([*words(tmp_path, "family_none"), "task=probe", "task.pictures=0"]))
    with pytest.raises(UserError, match="task.checkpoint: none named"):
        probe.probe(compose([*words(tmp_path, "family_none"), "task=probe"]))
