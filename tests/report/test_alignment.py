"""The figure of a sweep: scores against alignment."""

import numpy as np
import pytest

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


def test_a_sweep_without_probes_has_no_such_figure(tmp_path):
    make_run(tmp_path / "a", words=("aligner=none",))
    make_run(tmp_path / "b", words=("aligner=repa",))
    assert "Scores against alignment" not in write_report(tmp_path).read_text()
