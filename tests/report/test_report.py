import csv
import re

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from repalign.errors import UserError
from tasks.report import run, write_report
from tasks.report_data import attributions, higher_is_better, read_run, read_series
from tasks.report_files import numbers_of
from tasks.report_plots import smoothed
from tasks.report_sweep import band, cost_of, runs_below, summary, variants_of
from tests.report.made_up import ATTRIBUTION, make_manifest, make_run


def page_of(folder):
    return write_report(folder).read_text(encoding="utf-8")


def test_run_report_is_whole_and_needs_no_network(tmp_path):
    folder = make_run(tmp_path / "first")
    make_manifest(tmp_path / "cache")
    page = page_of(folder)
    outside = [u for u in re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)""", page) if not u.startswith("data:")]
    assert outside == [] and "url(" not in page and "@import" not in page and "<script" not in page
    for words in ("demo / first", "finished at step 200", "train/align/repa", "train/lr", "fd_lite0", "0123456789ab+"):
        assert words in page, words
    assert "OpenMoji, CC BY-SA 4.0 &lt;openmoji.org&gt;" in page  # escaped
    assert page.count("data:image/png") == 2 and page.count("data:image/webp") == 5 + 5  # ends, and both strips
    assert "step 0, averaged weights" in page and "step 200, averaged weights" in page
    assert "Not in this report" not in page


def test_score_table_says_before_and_after(tmp_path):
    folder = make_run(tmp_path / "run", metrics=False)
    (folder / "metrics.csv").write_text(
        "step,name,value\n0,eval/fd_lite0,200\n50,eval/fd_lite0,40\n100,eval/fd_lite0,50\n"
        "0,eval/is_lite0,2\n100,eval/is_lite0,1.5\n"
    )
    page = page_of(folder)
    row = re.search(r"<tr><td><code>fd_lite0</code>.*?</tr>", page)[0]
    assert re.findall(r">([-+\d.]+(?: %)?)<", row) == ["200", "50", "-75.0 %", "40", "50"] and "better" in row
    row = re.search(r"<tr><td><code>is_lite0</code>.*?</tr>", page)[0]
    assert '"number worse">-25.0 %' in row


@pytest.mark.parametrize("part", ["config", "overrides", "metrics", "samples", "record"])
def test_a_missing_part_is_said(tmp_path, part):
    folder = make_run(tmp_path / "run", **{part: False})
    name = {"metrics": "metrics.csv", "record": "run.json", "samples": "samples/"}.get(part, f"{part}.yaml")
    page = page_of(folder)
    assert "Not in this report" in page and f"<li>{name}: " in page


def test_torn_files_are_said_or_skipped(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "run.json").write_text('{"status": "runn')
    with open(folder / "metrics.csv", "a") as file:
        file.write("200,train/lo")
    page = page_of(folder)
    assert "run.json: cannot be read" in page and "unknown at step 200" in page
    series = read_series("step,name,value\n1,a,2\n1,a,3\n2,a,nan\n3,a,inf\nx\n4,a,5\n5,a")
    assert series["a"].steps.tolist() == [1, 4] and series["a"].values.tolist() == [3, 5]


def test_what_comes_from_a_run_is_escaped(tmp_path):
    folder = make_run(tmp_path / "run", words=("name=<script>alert(1)</script>",))
    assert "<script" not in page_of(folder)


def test_attribution_from_the_record_or_the_store(tmp_path):
    folder = make_run(tmp_path / "run")
    found = read_run(folder)
    assert attributions(found) == []
    make_manifest(tmp_path / "cache")
    assert attributions(found) == [ATTRIBUTION]
    found.record["attribution"] = "by the run"
    assert attributions(found) == ["by the run"]


def sweep(folder):
    for aligner, gain in (("none", 1.0), ("repa", 3.0)):
        for seed in range(3):
            words = ("experiment=demo", f"aligner={aligner}", f"run_name={aligner}{seed}")
            make_run(folder / f"{aligner}-{seed}", seed, gain=gain, words=words)
    return folder


def test_sweep_groups_seeds_and_names_what_differs(tmp_path):
    variants = variants_of(runs_below(sweep(tmp_path)))
    assert [(v.label, len(v.runs)) for v in variants] == [("aligner=none", 3), ("aligner=repa", 3)]
    values = [run.metrics["fd_lite0"].values[-1] for run in variants[0].runs]
    found = summary(variants[0], "fd_lite0")
    assert found.mean == pytest.approx(np.mean(values)) and found.std == pytest.approx(np.std(values, ddof=1))
    assert found.steps == (200,) and band(variants[0], "fd_lite0").steps.tolist() == [0, 50, 100, 150, 200]
    assert summary(variants[0], "nothing") is None and band(variants[0], "nothing") is None


def test_sweep_report(tmp_path):
    folder = sweep(tmp_path / "sweep")
    write_report(folder / "repa-0")
    page = page_of(folder)
    assert "6 runs" in page and "aligner=repa" in page and "repa-0/report.html" in page
    best = re.findall(r'<td class="number best">([\d.]+)', page)
    rows = variants_of(runs_below(folder))
    assert best[0] == f"{summary(rows[1], 'fd_lite0').mean:.4g}"
    assert page.count("data:image/png") == 2


def order_of(page):
    return re.findall(r'<td class="rank">\d+</td><td class="words"><code class="chip">aligner=(\w+)', page)


def test_leaderboard_is_sorted_and_drawn_against_cost(tmp_path):
    folder = sweep(tmp_path / "sweep")
    make_run(folder / "unscored", 0, words=("aligner=late",), metrics=False)
    assert order_of(page_of(folder)) == ["repa", "none", "late"]  # by the first score, which is low when it is good
    page = write_report(folder, sort="is_lite0").read_text(encoding="utf-8")
    assert order_of(page) == ["repa", "none", "late"] and "By <code>is_lite0</code>, highest first" in page
    (folder / "repa-0" / "metrics.csv").write_text("step,name,value\n200,eval/fd_lite0,1000\n200,eval/is_lite0,100\n")
    by_distance, by_score = (write_report(folder, sort=name).read_text() for name in ("fd_lite0", "is_lite0"))
    assert order_of(by_distance) == ["none", "repa", "late"] and order_of(by_score) == ["repa", "none", "late"]
    for kind in ("linear", "log", "hours", "flops"):
        assert page.count(f'<img class="{kind}"') == 3, kind
    with pytest.raises(UserError, match="task.sort: unknown score 'fd_lit'. Did you mean 'fd_lite0'"):
        write_report(folder, sort="fd_lit")


def test_cost_of_a_variant(tmp_path):
    none, repa = variants_of(runs_below(sweep(tmp_path)))
    found = band(repa, "fd_lite0", "flops")
    assert found.steps == pytest.approx(3e9 * np.array([0, 50, 100, 150, 200]))
    assert found.mean.tolist() == band(repa, "fd_lite0").mean.tolist()
    assert cost_of(none, "device_hours") == pytest.approx(2.5 * 200 / 3600)
    file = none.runs[0].path / "metrics.csv"  # of an older version: no cost
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "cost/" not in line and "flops" not in line))
    (variant, _) = variants_of(runs_below(tmp_path))
    assert cost_of(variant, "flops") is None and band(variant, "fd_lite0", "flops") is None
    assert band(variant, "fd_lite0").steps.tolist() == [0, 50, 100, 150, 200]


def test_names_of_older_versions_are_read():
    rows = "0,metric/fid,9\n5,evaluation/fid,8\n5,time/shared,0.1\n5,train/images_per_second,3\n5,train/loss,1\n"
    assert set(read_series(f"step,name,value\n{rows}")) == {
        *("eval/fid", "eval/checkpoint/fid", "throughput/phase_seconds/shared", "throughput/images_per_second"),
        "train/loss",
    }


def test_sweep_files(tmp_path):
    """A row per run, a line per variant, a picture that is not blank."""
    folder = sweep(tmp_path / "sweep")
    write_report(folder)
    with open(folder / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (f"aligner={aligner}", str(seed)) for aligner in ("repa", "none") for seed in range(3)
    ]
    assert {(row["seconds"], row["device_hours"], row["flops"]) for row in rows} == {("300", "0.138889", "6e+11")}
    values = [float(row["fd_lite0"]) for row in rows[3:]]
    mean, std = np.mean(values), np.std(values, ddof=1)
    table = (folder / "sweep.md").read_text(encoding="utf-8")
    assert f"| 2 | aligner=none | 3 | 200 | {mean:.4g} ± {std:.2g} |" in table
    assert table.splitlines()[0].endswith("| CPU-hours | FLOPs |") and table.count("| 0.139 | 6.00e11 |") == 2
    with Image.open(folder / "sweep.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_jobs_are_in_the_order_of_their_numbers(tmp_path):
    for number in (0, 2, 10, 1):
        make_run(tmp_path / str(number), number)
    assert [run.path.name for run in runs_below(tmp_path)] == ["0", "1", "2", "10"]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["align.weight=0.5", "align.weight=1e-3"], ("align.weight", [0.5, 0.001])),
        (["align.tap=block.4", "align.tap=block.10"], ("align.tap", [4.0, 10.0])),
        (["encoder=lite0", "encoder=tiny"], ("", [])),
        (["a=1 b=2", "a=2 b=2"], ("", [])),
        (["a=1", "b=2"], ("", [])),
        ([], ("", [])),
    ],
)
def test_variants_that_are_numbers_are_drawn_as_numbers(labels, found):
    assert numbers_of(labels) == found


def test_runs_that_end_at_different_steps_are_said(tmp_path):
    make_run(tmp_path / "a", 0, steps=200, words=("aligner=none",))
    make_run(tmp_path / "b", 0, steps=100, words=("aligner=repa",))
    assert "fd_lite0: the runs end at different steps (100 to 200)" in page_of(tmp_path)


def test_messages_and_the_task(tmp_path, capsys):
    with pytest.raises(UserError, match="task.folder: no folder"):
        write_report(tmp_path / "none")
    with pytest.raises(UserError, match="task.folder: no run below"):
        write_report(tmp_path)
    folder = make_run(tmp_path / "run")
    target = tmp_path / "out" / "page.html"
    run(OmegaConf.create({"task": {"folder": str(folder), "output": str(target)}}))
    assert target.is_file() and str(target) in capsys.readouterr().out


def test_smoothing_keeps_a_constant_and_the_length():
    for count in (8, 50, 3000):
        assert smoothed(np.full(count, 3.0)) == pytest.approx(np.full(count, 3.0))
    ramp = smoothed(np.arange(200.0))
    assert ramp[20:180] == pytest.approx(np.arange(20.0, 180.0))  # no lag


def test_direction_of_scores():
    assert higher_is_better("is_lite0") and not higher_is_better("fd_lite0") and not higher_is_better("fid")
