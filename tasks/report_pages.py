"""What the report of a run shows, as plain values for its template."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.pictures import open_picture
from tasks.report_data import Grid, RunFolder, attributions, higher_is_better
from tasks.report_plots import COLOURS, HALF, THIRD, WIDE, curve, metric_curve
from tasks.report_probe import probe_of
from tasks.report_scores import evaluation_of, own_protocol_notes

_MOST_GRIDS = 8


def run_page(run: RunFolder) -> dict[str, Any]:
    """Values of ``templates/run.html``."""
    heroes, strips = _pictures(run.grids)
    losses = sorted((n for n in run.series if _is_loss(n)), key=lambda n: (n != "train/loss", "align" in n, n))
    machine = [n for n in ("train/lr", "train/grad_norm", "throughput/images_per_second") if n in run.series]
    trained = [name for name in run.metrics if f"eval/{name}" in run.series]  # others are in the evaluation
    scores = [_score_row(run, name) for name in trained]
    probe = probe_of(run)  # before what is missing is shown
    return {
        "kind": "run report",
        "title": _title(run),
        "status": _status(run),
        "parts": _parts(run),
        "cards": _cards(run),
        "missing": run.missing,
        "incomparable": own_protocol_notes(run),
        "heroes": heroes,
        "strips": strips,
        "scores": scores,
        "first_step": min((int(s.steps[0]) for s in run.metrics.values()), default=0),
        "last_step": max((int(s.steps[-1]) for s in run.metrics.values()), default=0),
        "score_plots": [
            _figure(name, "score", lambda log, n=name: metric_curve(run, n, log))
            for name in trained
            if len(run.metrics[name].steps) > 1
        ],
        "evaluation": evaluation_of(run),
        "probe": probe,
        "losses": [_loss_figure(run, name, wide=index == 0) for index, name in enumerate(losses)],
        "machine_plots": [_machine_figure(run, name) for name in machine],
        "facts": _facts(run),
        "overrides": run.overrides,
        "config": run.text,
        "attributions": attributions(run),
    }


def _figure(name: str, caption: str, draw: Callable[[bool], str]) -> dict[str, str]:
    return {"name": name, "caption": caption, "linear": draw(False), "log": draw(True)}


def _is_loss(name: str) -> bool:
    others = ("train/lr", "train/grad_norm", "throughput/images_per_second")
    return name.startswith("train/") and name not in others


def _loss_figure(run: RunFolder, name: str, wide: bool) -> dict[str, str]:
    caption = "alignment" if "/align/" in name else "total" if name == "train/loss" else "term"
    colour = COLOURS[1] if "/align/" in name else COLOURS[0]
    return _figure(name, caption, lambda log: curve(run.series[name], log, colour, size=WIDE if wide else HALF))


def _machine_figure(run: RunFolder, name: str) -> dict[str, str]:
    caption = {"train/lr": "learning rate", "train/grad_norm": "gradient norm"}.get(name, "throughput")
    smooth = name != "train/lr"
    return _figure(name, caption, lambda log: curve(run.series[name], log, COLOURS[7], smooth, THIRD))


def _pictures(grids: Sequence[Grid]) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The first and the last averaged grid large, then the way between them for both kinds of weights."""
    words = {"ema": "averaged weights", "raw": "live weights"}
    by_kind = {kind: [g for g in grids if g.kind == kind] for kind in ("ema", "raw")}
    shown = by_kind["ema"] or by_kind["raw"]
    ends = [shown[0], shown[-1]] if len(shown) > 1 else shown
    heroes = [{"source": png(g.path), "caption": f"step {g.step:,}, {words[g.kind]}"} for g in ends]
    strips = [
        {
            "title": f"Over time, {words[kind]}",
            "grids": [{"source": _thumbnail(g.path), "caption": f"step {g.step:,}"} for g in _spread_out(found)],
        }
        for kind, found in by_kind.items()
        if len(found) > 1
    ]
    return heroes, strips


def _spread_out(grids: Sequence[Grid]) -> list[Grid]:
    if len(grids) <= _MOST_GRIDS:
        return list(grids)
    return [grids[i] for i in np.linspace(0, len(grids) - 1, _MOST_GRIDS).round().astype(int)]


def png(path: Path) -> str:
    """The file as it is, when it is a picture: a report carries no other file away."""
    with open_picture(path) as grid:
        grid.verify()
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _thumbnail(path: Path) -> str:
    """Small enough that many grids keep the page light."""
    buffer = io.BytesIO()
    with open_picture(path) as grid:
        small = grid.convert("RGB")
        small.thumbnail((440, 880), Image.Resampling.LANCZOS)
        small.save(buffer, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _score_row(run: RunFolder, name: str) -> dict[str, str]:
    series, spread = run.metrics[name], run.spread(name)
    before, after = float(series.values[0]), float(series.values[-1])
    rising = higher_is_better(name)
    best = int(np.argmax(series.values) if rising else np.argmin(series.values))
    improved = after > before if rising else after < before
    several = len(series.steps) > 1
    return {
        "name": name,
        "direction": "higher is better" if rising else "lower is better",
        "before": f"{before:.4g}" if several else "",
        "after": f"{after:.4g}",
        "spread": f"{spread.values[-1]:.2g}" if spread is not None else "",
        "change": f"{100 * (after - before) / abs(before):+.1f} %" if several and before else "",
        "verdict": "" if not several or after == before else "better" if improved else "worse",
        "best": f"{series.values[best]:.4g}",
        "best_step": f"{int(series.steps[best]):,}",
    }


def _title(run: RunFolder) -> str:
    own = str(run.config.get("run_name") or run.path.name)
    return run.title if own == run.title else f"{run.title} / {own}"


def _status(run: RunFolder) -> dict[str, str]:
    said = str(run.record.get("status", "unknown"))
    step = int(run.record.get("step", run.last_step))
    kind = next((k for k in ("finished", "stopped", "running") if said.startswith(k)), "unknown")
    return {"kind": kind, "text": f"{said} at step {step:,}"}


def _parts(run: RunFolder) -> list[str]:
    """Class names of the parts that characterise a run."""
    names = (str((run.config.get(k) or {}).get("_target_", "")) for k in ("method", "backbone", "path", "data"))
    return [name.rpartition(".")[2] for name in names if name]


def _cards(run: RunFolder) -> list[dict[str, Any]]:
    cards: list[dict[str, Any]] = []
    for name in list(run.metrics)[:2]:
        row = _score_row(run, name)
        note = f"from {row['before']} before training" if row["before"] else f"at step {row['best_step']}"
        cards.append({"what": name, "value": row["after"], "note": note})
    total = run.config.get("steps")
    note = f"of {total:,}" if isinstance(total, int) else ""
    cards.append({"what": "steps", "value": f"{int(run.record.get('step', run.last_step)):,}", "note": note})
    if "throughput/images_per_second" in run.series:
        speed = float(np.median(run.series["throughput/images_per_second"].values))
        cards.append({"what": "images per second", "value": f"{speed:.4g}", "note": "median of training"})
    if "seconds" in run.record:
        cards.append({"what": "time", "value": _duration(run.record["seconds"]), "note": "start to end"})
    if "seconds_to_first_step" in run.record:
        seconds = _duration(run.record["seconds_to_first_step"])
        cards.append({"what": "first step after", "value": seconds, "note": "set-up and data"})
    return cards


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """The record, flat; versions as one line."""
    flat = {k.replace("_", " "): v for k, v in run.record.items() if not isinstance(v, dict) and v is not None}
    versions = run.record.get("versions")
    if isinstance(versions, dict):
        flat["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    reference = run.config.get("reference")
    if isinstance(reference, dict):
        flat["reference"] = ", ".join(f"{name}: {value}" for name, value in reference.items())
    return [(name, str(value)) for name, value in {**flat, "folder": run.path}.items()]
