"""What a report of a sweep writes beside its page: a row per run as CSV, a table of the variants, a picture."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.report_data import RunFolder, higher_is_better
from tasks.report_leaderboard import COSTS, metrics_of, quantity
from tasks.report_plots import COLOURS, STYLE
from tasks.report_scores import protocol_notes
from tasks.report_sweep import Variant, band, cost_of, hours_word, ranked, summary, variants_of

_MOST_METRICS = 3  # rows of the picture
_COSTS = ("seconds", "device_hours", "flops")


def write_files(runs: Sequence[RunFolder], folder: Path, sort: str | None = None) -> list[Path]:
    """Write ``sweep.csv``, ``sweep.md`` and, where there are scores, ``sweep.png`` into a folder; the best by ``sort``
    first.
    """
    variants = ranked(variants_of(runs), sort)
    metrics = metrics_of(runs, sort)
    written = [folder / "sweep.csv", folder / "sweep.md"]
    with open(written[0], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([cell(text) for text in row] for row in rows_of(variants, metrics, folder))
    notes = "".join(f"\nWarning: {note}.\n" for note in protocol_notes(runs))
    written[1].write_text(table_of(variants, metrics) + notes, encoding="utf-8")
    if metrics:
        written.append(folder / "sweep.png")
        with matplotlib.rc_context(STYLE):
            picture_of(variants, metrics[:_MOST_METRICS]).savefig(written[-1], dpi=150)
    return written


def cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: those begin with = + - @; numbers stay as they are."""
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    return text


def markdown(text: str) -> str:
    """A text inside a table of Markdown: no column of its own, no tag."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("`", "'").replace("[", "\\[")


def rows_of(variants: Sequence[Variant], metrics: Sequence[str], folder: Path) -> list[list[str]]:
    """Header, then a row per run: its variant, seed, folder, status, last step, median speed, cost, last scores."""
    rows = [["variant", "seed", "run", "status", "step", "images_per_second", *_COSTS, *metrics]]
    for variant in variants:
        for run in variant.runs:
            speed = run.series.get("throughput/images_per_second")
            last = [f"{float(run.metrics[name].values[-1])!r}" if name in run.metrics else "" for name in metrics]
            rows.append(
                [
                    variant.label,
                    seed_of(run),
                    run.path.relative_to(folder).as_posix(),
                    str(run.record.get("status", "unknown")),
                    str(run.record.get("step", run.last_step)),
                    "" if speed is None else f"{np.median(speed.values):.4g}",
                    *("" if (cost := run.total(kind)) is None else f"{cost:.6g}" for kind in _COSTS),
                    *last,
                ]
            )
    return rows


def seed_of(run: RunFolder) -> str:
    """The seed of a run: as typed, else as composed, else empty."""
    typed = [word.partition("=")[2] for word in run.overrides if word.startswith("seed=")]
    return typed[-1] if typed else str(run.config.get("seed", ""))


def table_of(variants: Sequence[Variant], metrics: Sequence[str]) -> str:
    """Markdown: mean and standard deviation over the seeds of the scores at the last step."""
    hours = hours_word([run for variant in variants for run in variant.runs])
    lines = [
        f"| | variant | runs | step | {' | '.join(map(markdown, metrics))} | {hours} | FLOPs |",
        "|---|---|---|---|" + "---|" * (len(metrics) + 2),
    ]
    for place, variant in enumerate(variants, 1):
        found = [summary(variant, name) for name in metrics]
        steps = sorted({step for s in found if s is not None for step in s.steps})
        cells = ["-" if s is None else f"{s.mean:.4g}" + ("" if s.std is None else f" ± {s.std:.2g}") for s in found]
        shown = " to ".join(f"{step}" for step in (steps if len(steps) < 2 else (steps[0], steps[-1])))
        lines.append(
            f"| {place} | {markdown(variant.label)} | {len(variant.runs)} | {shown or '-'} | "
            + " | ".join([*cells, *(quantity(cost_of(variant, kind)) for kind in COSTS)])
            + " |"
        )
    return "\n".join(lines) + "\n"


def picture_of(variants: Sequence[Variant], metrics: Sequence[str]) -> Figure:
    """For each score a row: against the step, against hours and FLOPs where they were logged, and at the last step
    against what the variants differ in.
    """
    words = {"device_hours": hours_word([run for v in variants for run in v.runs]), "flops": "FLOPs"}
    known = [kind for kind in COSTS if any(band(v, name, kind) for v in variants for name in metrics)]
    columns = {"step": "step"} | {kind: words[kind] for kind in known}
    figure = Figure(figsize=(6 + 4 * len(columns), 3.4 * len(metrics)), layout="constrained")
    axes = figure.subplots(len(metrics), len(columns) + 1, squeeze=False)
    for name, row in zip(metrics, axes, strict=True):
        for place, (against, word) in zip(row[:-1], columns.items(), strict=True):
            _curves(place, variants, name, against)
            place.set_xlabel(word)
        better = "higher" if higher_is_better(name) else "lower"
        row[0].set_ylabel(f"{name} ({better} is better)")
        _ends(row[-1], variants, name)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
    return figure


def _curves(axes: Axes, variants: Sequence[Variant], name: str, against: str) -> None:
    for index, variant in enumerate(variants):
        found, colour = band(variant, name, against), COLOURS[index % len(COLOURS)]
        if found is None:
            continue
        axes.plot(found.steps, found.mean, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=variant.label)
        if found.std is not None:
            low, high = found.mean - found.std, found.mean + found.std
            axes.fill_between(found.steps, low, high, color=colour, alpha=0.12, linewidth=0)


def _ends(axes: Axes, variants: Sequence[Variant], name: str) -> None:
    ends = [(i, v, s) for i, v in enumerate(variants) if (s := summary(v, name)) is not None]
    key, places = numbers_of([v.label for _, v, _ in ends])
    for place, (index, _, end) in zip(places or range(len(ends)), ends, strict=True):
        colour = COLOURS[index % len(COLOURS)]
        axes.errorbar(
            [place], [end.mean], yerr=None if end.std is None else [end.std], fmt="o", color=colour, capsize=3
        )
    if places:
        axes.set_xlabel(key)
    else:
        axes.set_xticks(range(len(ends)), [_values_of(v.label) for _, v, _ in ends], rotation=40, ha="right")
    axes.margins(x=0.1, y=0.15)


def _values_of(label: str) -> str:
    """A variant's label without its keys, long numbers rounded."""
    values = [word.partition("=")[2] or word for word in label.split(" ")]
    return " ".join(re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.3g}", value) for value in values)


def numbers_of(labels: Sequence[str]) -> tuple[str, list[float]]:
    """Key and numbers of variants that differ in one value that is or ends in a number (0.5, block.4); else none."""
    found = [re.fullmatch(r"([^= ]+)=(?:[a-z_]+\.)?(-?\d+(?:\.\d+)?(?:e-?\d+)?)", label) for label in labels]
    keys = {match[1] for match in found if match}
    if len(keys) != 1 or not all(found):
        return "", []
    return keys.pop(), [float(match[2]) for match in found if match]
