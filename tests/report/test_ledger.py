"""Records of trainings and the ledger that is drawn from them."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from repalign.errors import UserError
from tasks import ledger
from tasks.run_records import Point, RunRecord, as_json, parse, read_records, record_of, write_record_of, write_records
from tests.report.made_up import make_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_committed_ledger_is_what_the_records_give():
    drawn = ledger.ledger_of(EXPERIMENTS)
    assert (EXPERIMENTS / "ledger.md").read_text(encoding="utf-8") == drawn, "python run.py task=ledger"
    assert drawn.count("\n## ") == len(list(EXPERIMENTS.glob("*/runs.json"))) >= 4


def test_every_committed_record_can_be_run_again():
    for file in EXPERIMENTS.glob("*/runs.json"):
        for record in read_records(file):
            assert record.command and record.commit and not record.commit.endswith("+") and record.device, file
            assert record.scores and max(point.step for point in record.scores) <= record.steps, file
            assert "/tmp" not in record.command and "paths." not in record.command, file


def finished(folder, seed=0, words=("experiment=demo", "aligner=none"), commit="0123456789ab"):
    run = make_run(folder, seed, words=(*words, f"run_name={folder.name}", "paths.runs=/somewhere"))
    told = json.loads((run / "run.json").read_text()) | {"commit": commit, "images": 100}
    (run / "run.json").write_text(json.dumps(told))
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "seed: 0\n")
    line = {"name": "fd_lite0", "step": 200, "value": 1.0, "ci95": 0.5, "protocol": "cafe0123", "record": {}}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return run


def test_a_record_holds_what_the_run_left(tmp_path):
    record = record_of(finished(tmp_path / "run"))
    assert (record.recipe, record.variant, record.steps, record.seed) == ("demo", "aligner=none", 200, 0)
    assert record.command == "python run.py experiment=demo aligner=none seed=0"
    assert record.device_hours == pytest.approx(2.5 * 200 / 3600) and record.flops == 6e11 and record.batch is None
    last = [point for point in record.scores if (point.name, point.step) == ("fd_lite0", 200)]
    assert [(p.protocol, p.ci95, p.flops) for p in last] == [("cafe0123", 0.5, 6e11)]
    assert write_record_of(tmp_path / "run") == record
    assert parse(json.loads((tmp_path / "run" / "record.json").read_text()), "x") == record
    write_records([record, record], tmp_path / "runs.json")
    assert read_records(tmp_path / "runs.json") == [record, record]
    run = json.loads((tmp_path / "run" / "run.json").read_text()) | {"status": "stopped: KeyboardInterrupt"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    with pytest.raises(UserError, match="the run is not finished .stopped"):
        record_of(tmp_path / "run")


GOOD = as_json(RunRecord("demo", "", 10, (Point("fid", 10, 1.0),), batch=4, images=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: expected 1, found 2"),
        ({"stepz": 1}, "unknown key 'stepz'. Did you mean 'steps'"),
        ({"steps": "10"}, "steps: expected int, found '10'"),
        ({"steps": True}, "steps: expected int, found True"),
        ({"flops": float("nan")}, "flops: expected a finite number"),
        ({"images": 0}, "images: expected 1 or more"),
        ({"scores": {}}, "scores: expected a list, found dict"),
        ({"scores": [{"name": "fid", "step": 1}]}, r"scores\[0\]: value: is missing"),
        ({"recipe": None}, "recipe: expected str, found None"),
    ],
)
def test_what_is_no_record_is_one_line(change, message, tmp_path):
    assert parse(GOOD, "file").epochs == 5
    with pytest.raises(UserError, match=message):
        parse({**GOOD, **change}, "file")
    (tmp_path / "runs.json").write_text("{}")
    with pytest.raises(UserError, match="expected a list of records"):
        read_records(tmp_path / "runs.json")
    (tmp_path / "runs.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no JSON"):
        read_records(tmp_path / "runs.json")


def task(folder, **options):
    return OmegaConf.create({"task": {"folder": str(folder), "add": None, "study": None, **options}})


def test_runs_are_taken_in_once_and_drawn(tmp_path):
    experiments, runs = tmp_path / "experiments", tmp_path / "runs"
    experiments.mkdir()
    for seed in range(2):
        finished(runs / f"none{seed}", seed)
        finished(runs / f"repa{seed}", seed, ("experiment=demo", "aligner=repa"))
    for _ in range(2):  # the second time they take their own places
        ledger.run(task(experiments, add=str(runs), study="mine"))
    assert len(read_records(experiments / "mine" / "runs.json")) == 4
    text = (experiments / "ledger.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `demo`")]
    assert len(rows) == 2 and all("| 2 |" in row and "| 0.139 | 6.00e11 | `cafe0123` |" in row for row in rows)
    assert "git checkout 0123456789ab && python run.py experiment=demo aligner=none seed=0" in text
    finished(runs / "dirty", words=("x=1",), commit="0123456789ab+")
    with pytest.raises(UserError, match=r"run from commit 0123456789ab\+: nobody can check that out"):
        ledger.run(task(experiments, add=str(runs), study="mine"))
    with pytest.raises(UserError, match="task.add, task.study: give both"):
        ledger.run(task(experiments, study="mine"))
    with pytest.raises(UserError, match="no run below"):
        ledger.run(task(experiments, add=str(experiments), study="mine"))


def test_words_of_a_record_are_inert(tmp_path):
    attack = "<script>x</script> | `[a](javascript:b)`"
    text = ledger.section_of(
        "study", [RunRecord(attack, attack, 1, (Point("fid", 1, 2.0),), commit="a", note=attack)], False
    )
    assert "<script" not in text and "](javascript" not in text.replace("\\[a](javascript", "")
