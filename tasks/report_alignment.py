"""The figure of representation alignment: does a run with better aligned hidden states have the better score?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from tasks.probe_rows import read_rows
from tasks.report_plots import COLOURS, HALF, drawn
from tasks.report_sweep import Variant


@dataclass(frozen=True)
class Point:
    """A run: its best alignment over layers and times, its score at the last step, its variant."""

    alignment: float
    score: float
    variant: str


def points_of(variants: Sequence[Variant], measure: str, metric: str) -> list[Point]:
    """One point per run that was probed (``probe/probe.csv``) and has the score."""
    points = []
    for variant in variants:
        for run in variant.runs:
            values = [row.value for row in read_rows(run.path / "probe" / "probe.csv") if row.measure == measure]
            if values and metric in run.metrics:
                points.append(Point(max(values), float(run.metrics[metric].values[-1]), variant.label))
    return points


def alignment_figures(variants: Sequence[Variant], metrics: Sequence[str]) -> list[dict[str, str]]:
    """Scatter plots of every score against every CKNNA, where at least two runs have both."""
    found = {
        row.measure
        for variant in variants
        for run in variant.runs
        for row in read_rows(run.path / "probe" / "probe.csv")
        if row.measure.startswith("cknna/")
    }
    figures = []
    for metric in metrics:
        for measure in sorted(found):
            points = points_of(variants, measure, metric)
            if len(points) > 1:
                figures.append(
                    {"source": scatter(points, measure, metric), "caption": _caption(points, measure, metric)}
                )
    return figures


def scatter(points: Sequence[Point], measure: str, metric: str) -> str:
    """A point per run, a colour per variant."""

    def draw(axes: Axes) -> None:
        for place, label in enumerate(dict.fromkeys(point.variant for point in points)):
            own = [point for point in points if point.variant == label]
            xs, ys = [point.alignment for point in own], [point.score for point in own]
            axes.plot(xs, ys, "o", markersize=6, color=COLOURS[place % len(COLOURS)], label=label)
        axes.set(xlabel=f"best {measure} over layers and times", ylabel=metric)
        axes.legend(loc="best")
        axes.margins(0.12)

    return drawn(draw, HALF)


def _caption(points: Sequence[Point], measure: str, metric: str) -> str:
    """The rank correlation says whether the two go together; over few runs it says little."""
    if len(points) < 3:
        return f"{metric} against {measure}, {len(points)} runs"
    ranks = [np.argsort(np.argsort([getattr(p, name) for p in points])) for name in ("alignment", "score")]
    rank = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    return f"{metric} against {measure}, {len(points)} runs, rank correlation {rank:+.2f}"
