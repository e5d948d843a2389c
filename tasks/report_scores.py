"""What a report says of scores: values with their intervals and protocols, and which of them cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from callbacks.score_log import FILE, read_scores
from repalign.metrics.protocol import differences
from tasks.report_data import RunFolder


def evaluation_of(run: RunFolder) -> dict[str, Any] | None:
    """Values of the section on ``evaluation.json``; None when there is none."""
    values = run.evaluation.get("metrics")
    if not isinstance(values, dict):
        return None
    told = run.evaluation
    caption = (
        f"{told.get('num_samples')} pictures against {told.get('num_reference')} real ones, network "
        f"{told.get('network')}, {told.get('date')}"
    )
    protocol = told.get("protocol_of") or {}
    rows = []
    for name, value in values.items():
        if name.endswith(("_std", "_ci95")):
            continue
        interval = values.get(f"{name}_ci95")
        spread = "" if interval is None else f" ± {float(interval):.2g}"
        rows.append((name, f"{float(value):.6g}{spread}", protocol.get(name, "")))
    return {"caption": caption, "rows": rows, "protocols": _protocols(told.get("protocols") or {})}


def _protocols(protocols: dict[str, Any]) -> list[tuple[str, str]]:
    """Hash and entries of each protocol, what is not known left out."""
    return [
        (short, ", ".join(f"{name}: {value}" for name, value in record.items() if value is not None))
        for short, record in protocols.items()
    ]


def protocol_notes(runs: Sequence[RunFolder]) -> list[str]:
    """One sentence per score whose last numbers in the runs have different protocols."""
    last: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for entry in read_scores(run.path / FILE):
            last.setdefault(entry["name"], {})[str(run.path)] = entry
    notes = []
    for name, of_run in last.items():
        protocols = {entry["protocol"]: entry["record"] for entry in of_run.values()}
        if len(protocols) > 1:
            (one, first), (two, second), *_ = protocols.items()
            told = "; ".join(differences(first, second))
            notes.append(f"{name}: numbers of {len(protocols)} protocols ({one}, {two}: {told}); do not compare them")
    return notes
