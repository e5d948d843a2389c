"""The callback of a training and task=evaluate are one evaluator: the same number under the same protocol."""

import csv

import pytest

from callbacks.score_log import read_scores
from tasks import evaluate
from tasks.check import check_composition
from tasks.launch import compose
from tests.smoke.test_recipes_train import train


@pytest.mark.slow
def test_the_same_number_in_training_and_after_it(tmp_path, capsys):
    words = ["callbacks=evaluation", "callbacks.evaluate.num_samples=12"]
    run_dir = train(tmp_path, "experiment=sit_s", *words)
    last = {line["name"]: line for line in read_scores(run_dir / "metrics.jsonl") if line["step"] == 2}
    base = [
        "experiment=sit_s",
        "debug=tiny",
        f"paths.runs={tmp_path}",
        "run_name=run",
        f"paths.cache={tmp_path / 'cache'}",
    ]
    cfg = compose([*base, "task=evaluate", "task.num_samples=12", "task.batch_size=7"])
    check_composition(cfg)
    evaluate.run(cfg)
    after = {line["name"]: line for line in read_scores(run_dir / "metrics.jsonl")}
    assert after.keys() == last.keys() == {"fd_lite0", "kid_lite0", "is_lite0"}
    for name, line in after.items():
        assert line["step"] == 2 and line["protocol"] == last[name]["protocol"], line["record"]
        assert line["value"] == pytest.approx(last[name]["value"], rel=1e-4)
    with open(run_dir / "metrics.csv", newline="") as file:
        logged = {row["name"]: float(row["value"]) for row in csv.DictReader(file) if row["step"] == "2"}
    assert logged["eval/checkpoint/fd_lite0"] == after["fd_lite0"]["value"]
    assert after["fd_lite0"]["ci95"] == logged["eval/checkpoint/fd_lite0_ci95"] > 0 and last["fd_lite0"]["ci95"] is None
    assert after["is_lite0"]["ci95"] is None
    assert "is_lite0: no interval, half of 12 pictures are too few for this score" in capsys.readouterr().out
