"""Curves as SVG, ready for the ``src`` of an image."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.report_data import RunFolder, Series, higher_is_better
from tasks.report_sweep import Band

COLOURS = (
    *("#3457d5", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285"),
    *("#c2255c", "#866118", "#495057", "#e8a400", "#74b816"),
)
STYLE = {
    "text.parse_math": False,  # names of runs and scores are words, no formulas
    "svg.fonttype": "path",
    "font.size": 8.5,
    "text.color": "#3a3f4a",
    "axes.labelcolor": "#6b7180",
    "axes.edgecolor": "#c9ccd3",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ececf0",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#8a8f9c",
    "ytick.color": "#8a8f9c",
    "xtick.labelcolor": "#6b7180",
    "ytick.labelcolor": "#6b7180",
    "legend.frameon": False,
}
_MOST_POINTS = 500

Size = tuple[float, float]  # inches; the page scales an image to its column
WIDE: Size = (9.6, 3.1)
HALF: Size = (4.7, 2.5)
THIRD: Size = (3.4, 2.3)


def curve(series: Series, log_x: bool, colour: str = COLOURS[0], smooth: bool = True, size: Size = HALF) -> str:
    """One quantity against the step: raw values faint, smoothed ones strong."""

    def draw(axes: Axes) -> None:
        if not smooth or len(series.steps) < 8:
            axes.plot(*_thin(series.steps, series.values), color=colour, linewidth=1.6, marker=_marker(series))
            return
        strong = smoothed(series.values)
        axes.plot(*_thin(series.steps, series.values), color=colour, alpha=0.25, linewidth=0.9)
        axes.plot(*_thin(series.steps, strong), color=colour, linewidth=1.9)
        # Single spikes of the raw curve must not squeeze the smoothed one.
        low, high = (
            min(np.quantile(series.values, 0.01), strong.min()),
            max(np.quantile(series.values, 0.99), strong.max()),
        )
        if high > low:
            axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))

    return _figure(draw, log_x, size)


def metric_curve(run: RunFolder, metric: str, log_x: bool) -> str:
    """A score against the step, with the deviation that was logged beside it."""
    series, spread = run.metrics[metric], run.spread(metric)

    def draw(axes: Axes) -> None:
        axes.plot(series.steps, series.values, color=COLOURS[0], linewidth=1.9, marker="o", markersize=4.5)
        if spread is not None and len(spread.steps) == len(series.steps):
            low, high = series.values - spread.values, series.values + spread.values
            axes.fill_between(series.steps, low, high, color=COLOURS[0], alpha=0.14, linewidth=0)
        best = int(np.argmax(series.values) if higher_is_better(metric) else np.argmin(series.values))
        axes.annotate(
            f"{series.values[best]:.4g}",
            (series.steps[best], series.values[best]),
            xytext=(0, -14 if higher_is_better(metric) else 9),
            textcoords="offset points",
            ha="center",
            color=COLOURS[0],
            fontweight="bold",
        )
        axes.margins(x=0.08, y=0.18)

    return _figure(draw, log_x, THIRD)


def bands(curves: Mapping[str, Band], log_x: bool, against: str = "step") -> str:
    """A score against the step, or against a cost, for several variants, with the deviation between seeds."""

    def draw(axes: Axes) -> None:
        for colour, (label, band) in zip(_cycle(len(curves)), curves.items(), strict=True):
            axes.plot(band.steps, band.mean, color=colour, linewidth=1.9, marker="o", markersize=4, label=label)
            if band.std is not None:
                low, high = band.mean - band.std, band.mean + band.std
                axes.fill_between(band.steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2 if max(map(len, curves)) < 30 else 1)

    # Room below for the words of the variants.
    return _figure(draw, log_x, (HALF[0], 3.0 + 0.2 * len(curves)), against)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Gaussian mean over about a fortieth of the curve to either side; centred, so that it does not lag behind."""
    width = max(1.0, len(values) / 80)
    radius = min(round(3 * width), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)
    # The ends have fewer neighbours: divide by the weight that is there.
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, evenly spaced in both linear and logarithmic step, ends included."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    even = np.linspace(0, len(steps) - 1, _MOST_POINTS // 2)
    early = np.geomspace(1, len(steps), _MOST_POINTS // 2) - 1
    chosen = np.unique(np.concatenate([even, early]).round().astype(int))
    return steps[chosen], values[chosen]


def _marker(series: Series) -> str:
    return "o" if len(series.steps) < 8 else ""


def _cycle(count: int) -> Sequence[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _figure(draw: Callable[[Axes], None], log_x: bool, size: Size, against: str = "step") -> str:
    def against_the_step(axes: Axes) -> None:
        draw(axes)
        if log_x:
            # symlog keeps step 0, where the scores before training are.
            axes.set_xscale("symlog", linthresh=10)
            axes.set_xlim(left=0)
        axes.set_xlabel(against)

    return drawn(against_the_step, size)


def drawn(draw: Callable[[Axes], None], size: Size) -> str:
    """A figure in the report's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # As an image of its own: identifiers inside two inline SVGs would meet.
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
