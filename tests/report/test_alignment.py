"""The figure of a sweep: scores against alignment."""

import re

import numpy as np
import pytest
from PIL import Image

from tasks.probe_pictures import heat_map
from tasks.probe_rows import Row, read_rows, table_of, write_rows
from tasks.report import write_report
from tasks.report_alignment import points_of
from tasks.report_sweep import runs_below, variants_of
from tests.report.made_up import make_run


def probed(folder, best):
    (folder / "probe").mkdir()
    rows = [Row("block.1", 0.5, "cknna/main", best / 2), Row("block.2", 0.5, "cknna/main", best)]
    write_rows(folder / "probe" / "probe.csv", [*rows, Row("block.2", 0.5, "accuracy", 0.9)])
    return rows


def test_rows_survive_the_file(tmp_path):
    folder = make_run(tmp_path / "a")
    rows = probed(folder, 0.1 + 0.2)
    assert read_rows(folder / "probe" / "probe.csv")[:2] == rows
    assert read_rows(tmp_path / "none.csv") == []
    assert "| cknna/main | t = 0.5 |\n|---|---|\n| block.1 | 0.150 |\n| block.2 | 0.300 |" in table_of(rows)


def test_scores_are_drawn_against_alignment(tmp_path):
    for place, (word, gain, best) in enumerate([("none", 0.5, 0.2), ("repa", 1.0, 0.4), ("sra", 2.0, 0.6)]):
        probed(make_run(tmp_path / word, place, gain=gain, words=(f"aligner={word}",)), best)
    make_run(tmp_path / "unprobed", 9, words=("aligner=other",))
    variants = variants_of(runs_below(tmp_path))
    points = points_of(variants, "cknna/main", "fd_lite0")
    assert sorted(point.alignment for point in points) == pytest.approx([0.2, 0.4, 0.6])
    ordered = [p.score for p in sorted(points, key=lambda p: p.alignment)]
    assert (np.diff(ordered) < 0).all()  # made up so: more alignment, smaller distance
    page = write_report(tmp_path).read_text()
    assert "fd_lite0 against cknna/main, 3 runs, rank correlation -1.00" in page
    assert "accuracy, 3 runs" not in page


def test_a_run_that_was_probed_shows_what_was_found(tmp_path):
    """Heat map, table and pictures of components in the run's own page."""
    folder = make_run(tmp_path / "run")
    assert "What the hidden states know" not in write_report(folder).read_text()
    rows = probed(folder, 0.4)
    taps, times = ["block.1", "block.2"], [0.5]
    heat_map("cknna/main", {(r.tap, r.t): r.value for r in rows}, taps, times).savefig(folder / "probe/cknna_main.png")
    for t in ("0.5", "0.1", "1e-05"):
        Image.new("RGB", (40, 20)).save(folder / "probe" / f"components_t{t}.png")
    (folder / "probe" / "probe.json").write_text('{"pictures": 400, "encoders": {"main": "x"}}')
    before = write_report(folder).read_text()
    section = before[before.index('<section id="probe">') :]
    section = section[: section.index("</section>")]
    assert "on 400 pictures" in section and "Columns: picture, encoder main, block.1, block.2." in section
    assert section.count("data:image/png") == 1 + 3
    assert re.findall(r"<figcaption>t = ([^<]+)<", section) == ["1e-05", "0.1", "0.5"]
    rows_of_tables = re.findall(r"<tr>(<td><code>.*?)</tr>", section)
    found = [re.sub(r"<[^>]+>", " ", row).split() for row in rows_of_tables]
    assert found[:2] == [["accuracy", "0.900", "block.2", "0.5"], ["cknna/main", "0.400", "block.2", "0.5"]]
    assert found[2:] == [["block.2", "0.900"], ["block.1", "0.200"], ["block.2", "0.400"]]
    (folder / "probe" / "probe.json").write_text('{"pict')
    assert "probe/probe.json: cannot be read" in write_report(folder).read_text()


def test_a_sweep_without_probes_has_no_such_figure(tmp_path):
    make_run(tmp_path / "a", words=("aligner=none",))
    make_run(tmp_path / "b", words=("aligner=repa",))
    assert "Scores against alignment" not in write_report(tmp_path).read_text()
