"""What the report of a sweep shows, as plain values for its template: a leaderboard, curves, pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tasks.report_alignment import alignment_figures
from tasks.report_data import Grid, RunFolder, attributions, higher_is_better
from tasks.report_pages import png
from tasks.report_plots import bands
from tasks.report_scores import protocol_notes
from tasks.report_sweep import Variant, band, cost_of, hours_word, ranked, summary, variants_of

COSTS = ("device_hours", "flops")  # what a score is drawn against, besides the step
_MOST_FIGURES = 6  # scores with curves; the table has all of them


def sweep_page(runs: Sequence[RunFolder], folder: Path, sort: str | None) -> dict[str, Any]:
    """Values of ``templates/sweep.html``.

    Args:
        runs: the runs of a sweep.
        folder: where the page will lie.
        sort: the score that decides the order; None where there is none.
    """
    variants = ranked(variants_of(runs), sort)
    metrics = metrics_of(runs, sort)
    hours = hours_word(runs)
    finished = sum(str(run.record.get("status")) == "finished" for run in runs)
    grids = [(v, g) for v in variants for g in _last_ema(v.runs[0].grids)]
    drawn = [name for name in metrics if any(band(v, name) for v in variants)][:_MOST_FIGURES]
    return {
        "kind": "leaderboard",
        "title": folder.name,
        "count": len(runs),
        "seeds": max(len(v.runs) for v in variants),
        "cards": [
            {"what": "runs", "value": len(runs), "note": f"{finished} finished"},
            {"what": "variants", "value": len(variants), "note": "differ by more than the seed"},
            *(_best_card(variants, name) for name in metrics[:3]),
        ],
        "missing": _sweep_notes(variants, metrics),
        "incomparable": protocol_notes(runs),
        "metrics": metrics,
        "sort": sort,
        "order": "" if sort is None else "highest first" if higher_is_better(sort) else "lowest first",
        "hours": hours,
        "variants": [_variant_row(v, variants, metrics, folder) for v in variants],
        "plots": [_curves(variants, name, hours) for name in drawn],
        "costs": any(len(run.cost(kind).steps) for run in runs for kind in COSTS),
        "alignment": alignment_figures(variants, metrics),
        "grids": [{"source": png(g.path), "caption": f"{v.label} (step {g.step:,})"} for v, g in grids],
        "attributions": sorted({text for run in runs for text in attributions(run)}),
    }


def metrics_of(runs: Sequence[RunFolder], sort: str | None) -> list[str]:
    """Every score of some runs, the one that decides the order first."""
    found = list(dict.fromkeys(name for run in runs for name in run.metrics))
    return found if sort is None else [sort, *(name for name in found if name != sort)]


def quantity(value: float | None) -> str:
    """A cost in few characters; '-' where it was not logged."""
    if value is None:
        return "-"
    return f"{value:.3g}" if 1e-3 <= value < 1e5 or value == 0 else f"{value:.2e}".replace("e+", "e")


def _curves(variants: Sequence[Variant], name: str, hours: str) -> dict[str, str]:
    def drawn(against: str, word: str, log: bool = False) -> str:
        curves = {v.label: found for v in variants if (found := band(v, name, against)) is not None}
        return bands(curves, log, word) if curves else ""

    return {
        "name": name,
        "caption": "higher is better" if higher_is_better(name) else "lower is better",
        "linear": drawn("step", "step"),
        "log": drawn("step", "step", log=True),
        "hours": drawn("device_hours", hours),
        "flops": drawn("flops", "FLOPs of the training"),
    }


def _last_ema(grids: Sequence[Grid]) -> list[Grid]:
    return [g for g in grids if g.kind == "ema"][-1:]


def _best_of(variants: Sequence[Variant], name: str) -> float | None:
    means = [found.mean for v in variants if (found := summary(v, name)) is not None]
    return None if not means else max(means) if higher_is_better(name) else min(means)


def _best_card(variants: Sequence[Variant], name: str) -> dict[str, str]:
    best = _best_of(variants, name)
    owner = next(v.label for v in variants if (s := summary(v, name)) is not None and s.mean == best)
    return {"what": f"best {name}", "value": f"{best:.4g}", "note": owner}


def _variant_row(v: Variant, variants: Sequence[Variant], metrics: Sequence[str], folder: Path) -> dict[str, Any]:
    found = {name: summary(v, name) for name in metrics}
    steps = sorted({step for s in found.values() if s is not None for step in s.steps})
    cells = [
        {
            "mean": f"{s.mean:.4g}" if s is not None else "-",
            "std": f"{s.std:.2g}" if s is not None and s.std is not None else "",
            "best": s is not None and len(variants) > 1 and s.mean == _best_of(variants, name),
        }
        for name, s in found.items()
    ]
    links = []
    for run in v.runs:
        target = run.path / "report.html" if (run.path / "report.html").is_file() else run.path
        # Quoted, and with './' in front: the name of a folder is no scheme ("javascript:").
        links.append({"href": "./" + quote(os.path.relpath(target, folder)), "text": run.path.name})
    shown = " to ".join(f"{step:,}" for step in (steps if len(steps) < 2 else (steps[0], steps[-1])))
    return {
        "rank": variants.index(v) + 1,
        "words": v.label.split(" "),
        "seeds": len(v.runs),
        "step": shown or "-",
        "cells": cells,
        "hours": quantity(cost_of(v, "device_hours")),
        "flops": quantity(cost_of(v, "flops")),
        "links": links,
    }


def _sweep_notes(variants: Sequence[Variant], metrics: Sequence[str]) -> list[str]:
    notes = [f"{run.path.name}: {line}" for v in variants for run in v.runs for line in run.missing]
    for name in metrics:
        last = {step for v in variants if (s := summary(v, name)) is not None for step in s.steps}
        if len(last) > 1:
            notes.append(
                f"{name}: the runs end at different steps ({min(last):,} to {max(last):,}); compare the curves"
            )
    return notes
