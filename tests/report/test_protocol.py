"""The record that goes with a number, its hash, and what is said when two numbers cannot be compared."""

import json

import numpy as np
import pytest
import torch

from callbacks.score_log import append_scores, read_scores, score_lines, shown
from repalign.errors import UserError
from repalign.metrics.frechet import FrechetDistance
from repalign.metrics.kid import KernelDistance
from repalign.metrics.protocol import FIELDS, differences, hash_of, protocol_of
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics, SeveralFeatures
from tasks.evaluate import set_reference, summary, write_evaluation
from tasks.launch import compose
from tasks.report import write_report
from tests.metrics.small import SmallNetwork, pictures
from tests.report.made_up import make_run

DRAWING = {"labels": "uniform", "rounding": "round", "sampler": {"steps": 50}, "guidance": None, "seed": 0, "ema": True}


def scored(count=20, draws=0, seed=0):
    metrics = FeatureMetrics(
        SmallNetwork(seed=seed), {"fd": FrechetDistance(), "kd": KernelDistance(4, 10)}, draws=draws
    )
    metrics.set_reference(Reference.measure(metrics._features, [pictures(30, 1)], "real"))
    metrics.update(pictures(count, 2))
    return metrics


def test_every_number_carries_its_protocol(tmp_path):
    metrics = scored(draws=4)
    values = metrics.compute()
    lines = score_lines(metrics, values, DRAWING, 7)
    assert [line["name"] for line in lines] == ["fd", "kd"]
    record = lines[0]["record"]
    assert set(record) == set(FIELDS)
    assert record["features"] == metrics.network.fingerprint and record["num_samples"] == 20
    assert record["reference"] == "real" and record["num_reference"] == 30 and record["sampler"] == {"steps": 50}
    assert lines[0]["ci95"] > 0 and len(lines[0]["protocol"]) == 8
    assert append_scores(tmp_path / "metrics.jsonl", lines) == []
    assert read_scores(tmp_path / "metrics.jsonl") == json.loads(json.dumps(lines))
    assert shown(values)[0].startswith("fd ") and " ± " in shown(values)[0] and len(shown(values)) == 2


def test_what_changes_the_hash_and_what_does_not():
    record = protocol_of(scored(), DRAWING)
    assert hash_of(record) == hash_of(dict(reversed(record.items())))
    assert hash_of({**record, "seed": 5}) == hash_of(record)
    for name in FIELDS:
        if name != "seed":
            assert hash_of({**record, name: "another"}) != hash_of(record), name
    assert hash_of(protocol_of(scored(count=19), DRAWING)) != hash_of(record)
    assert hash_of(protocol_of(scored(seed=1), DRAWING)) != hash_of(record)


def test_numbers_of_different_protocols_are_not_compared_in_silence(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for drawing, expected in ((DRAWING, 0), (DRAWING, 0), ({**DRAWING, "labels": "balanced"}, 1), (DRAWING, 1)):
        metrics = scored()
        warnings = append_scores(file, score_lines(metrics, metrics.compute(), drawing, None))
        assert len(warnings) == expected
    assert warnings[0].startswith("fd, kd: the last number in metrics.jsonl has protocol ")
    assert "labels: balanced against uniform" in warnings[0]
    one = protocol_of(scored(), DRAWING)
    assert differences(one, {**one, "seed": 3}) == []


def test_torn_lines_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = scored()
    append_scores(file, score_lines(metrics, metrics.compute(), {}, None))
    file.write_text(file.read_text() + '{"name": "fd", "val')
    assert len(read_scores(file)) == 2 and read_scores(tmp_path / "none") == []


def test_several_feature_spaces_in_one_pass():
    one, other = scored(), scored(seed=1)
    other.scores = {"fd_other": FrechetDistance()}
    one.reset(), other.reset()
    both = SeveralFeatures({"a": one, "b": other})
    for part in pictures(20, 2).split(6):
        both.update(part)
    values = both.compute()
    assert values.keys() == {"fd", "kd", "kd_std", "fd_other"} and both.count == 20
    assert values["fd"] == scored().compute()["fd"] and values["fd"] != values["fd_other"]
    lines = score_lines(both, values, DRAWING, None)
    assert len({line["protocol"] for line in lines}) == 2
    both.reset()
    assert both.count == 0
    with pytest.raises(UserError, match="two scores are called fd"):
        SeveralFeatures({"a": scored(), "b": scored()})


@pytest.mark.parametrize("name", ["adm_50k", "repa", "rae", "ddt", "quick_5k"])
def test_presets(name):
    cfg = compose(["experiment=repa_sit_xl", "task=evaluate", f"protocol={name}"])
    assert cfg.protocol.name == name and cfg.task.num_samples == (5000 if name == "quick_5k" else 50000)
    assert cfg.task.labels == ("balanced" if name in ("rae", "ddt") else "uniform")
    assert cfg.task.rounding == ("truncate" if name in ("repa", "rae") else "round")
    assert {"fid", "sfid", "is", "precision", "recall"} <= set(cfg.metric.scores)
    if name == "repa":
        assert cfg.sampler.steps == 250 and cfg.sampler.diffusion == "linear"
    again = compose(["experiment=repa_sit_xl", "task=evaluate", f"protocol={name}", "task.num_samples=10"])
    assert again.task.num_samples == 10


def test_adm_reference_batch_gives_moments_and_pictures(tmp_path):
    """Published moments for the distance, the pictures beside them for kernel distances and neighbours."""
    real = pictures(40, 1)
    metrics = scored()
    wide = Reference.measure(metrics._features, [pictures(200, 5)], "wide")
    bytes_ = (real * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    file = tmp_path / "VIRTUAL.npz"
    np.savez(file, arr_0=bytes_, mu=wide.mean.numpy(), sigma=wide.covariance.numpy())
    set_reference(metrics, file, None, tmp_path / "cache", 16)
    assert torch.allclose(metrics.reference.mean, wide.mean) and len(metrics.reference.features) == 40
    told = metrics.reference.fingerprint
    assert told.startswith("VIRTUAL.npz-") and len(told) == len("VIRTUAL.npz-") + 16  # name and hash of the content
    kept = list((tmp_path / "cache").iterdir())
    copy = tmp_path / "elsewhere" / "copy.npz"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    set_reference(metrics, copy, None, tmp_path / "cache", 16)  # the same content: nothing is measured again
    assert list((tmp_path / "cache").iterdir()) == kept
    only = FeatureMetrics(SmallNetwork(), {"fd": FrechetDistance()})
    set_reference(only, file, None, tmp_path / "none", 16)  # moments are enough
    assert not (tmp_path / "none").exists()


def test_a_report_of_several_protocols_says_so(tmp_path):
    for name, labels in (("a", "uniform"), ("b", "balanced")):
        make_run(tmp_path / name)
        metrics = scored(draws=2)
        lines = score_lines(metrics, metrics.compute(), {**DRAWING, "labels": labels}, 3)
        append_scores(tmp_path / name / "metrics.jsonl", lines)
        write_evaluation(summary(metrics, lines), tmp_path / name / "evaluation.json")
    page = write_report(tmp_path).read_text()
    assert "fd, kd: numbers of 2 protocols" in page and "labels: uniform against balanced" in page
    assert "Not to be compared" in page
    table = (tmp_path / "sweep.md").read_text()
    assert "\nWarning: fd, kd: numbers of 2 protocols" in table and "do not compare them.\n" in table
    page = write_report(tmp_path / "a").read_text()
    assert "Not to be compared" not in page
    assert lines[0]["protocol"] not in page and "labels: uniform" in page and " ± " in page


def test_a_run_with_numbers_of_several_protocols_says_so(tmp_path):
    """Of the training and of an evaluation after it, with another number of pictures."""
    run = make_run(tmp_path / "run")
    for count in (20, 25):
        metrics = scored(count)
        append_scores(run / "metrics.jsonl", score_lines(metrics, metrics.compute(), DRAWING, 3))
    page = write_report(run).read_text()
    assert "Not to be compared" in page and "fd, kd: numbers of 2 protocols" in page
    assert "num_samples: 20 against 25" in page


def test_a_sweep_compares_the_numbers_that_it_shows(tmp_path):
    """One run was evaluated again by another protocol; its table still shows the number of the training."""
    for name in ("a", "b"):
        run = make_run(tmp_path / name, words=(f"aligner={name}",))
        metrics = scored()
        values = metrics.compute()
        append_scores(run / "metrics.jsonl", score_lines(metrics, values, DRAWING, 200))
        with open(run / "metrics.csv", "a") as file:
            file.write(f"300,eval/fd,{values['fd']!r}\n")
    other = scored(25)
    append_scores(tmp_path / "a" / "metrics.jsonl", score_lines(other, other.compute(), DRAWING, 300)[:1])
    assert "Not to be compared" not in write_report(tmp_path).read_text()
    with open(tmp_path / "a" / "metrics.csv", "a") as file:
        file.write(f"400,eval/fd,{other.compute()['fd']!r}\n")
    assert "fd: numbers of 2 protocols" in write_report(tmp_path).read_text()


def test_scores_of_an_evaluation_stand_in_the_table_of_a_sweep(tmp_path):
    for place, name in enumerate("ab"):
        run = make_run(tmp_path / name, words=(f"aligner={name}",))
        with open(run / "metrics.csv", "a") as file:
            values = {"fid": 12.5 + place, "fid_ci95": 0.5, "fd_lite0": 1.0}
            file.writelines(f"200,eval/checkpoint/{name},{value}\n" for name, value in values.items())
    page = write_report(tmp_path).read_text()
    assert '<th class="number">fid</th>' in page and "12.5" in page and "fid_ci95" not in page
    table = (tmp_path / "sweep.md").read_text()
    assert "| 12.5 |" in table and "| 13.5 |" in table
    assert "| 200 | 1 |" not in table  # fd_lite0 of the training stays
