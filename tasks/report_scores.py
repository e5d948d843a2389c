"""What a report says of scores: values with their intervals and protocols, and which of them cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        (short, ", ".join(f"{name}: {_told(value)}" for name, value in record.items() if value is not None))
        for short, record in protocols.items()
    ]


def _told(value: Any) -> str:
    """An object of the configuration as its class and its options, those that say nothing left out."""
    if not isinstance(value, dict):
        return str(value)
    name = str(value.get("_target_", "")).rpartition(".")[2]
    options = [f"{key} {_told(own)}" for key, own in value.items() if key != "_target_" and own not in (None, {}, [])]
    return f"{name} ({', '.join(options)})" if options else name


def protocol_notes(runs: Sequence[RunFolder]) -> list[str]:
    """What keeps the numbers that the runs show from being compared: one sentence per set of protocols."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        own = read_scores(run.path / FILE)
        for name in dict.fromkeys(entry["name"] for entry in own):
            entries.setdefault(name, []).append(_shown(run, [entry for entry in own if entry["name"] == name]))
    return _notes(entries)


def own_protocol_notes(run: RunFolder) -> list[str]:
    """The same of one run's numbers, of the training and after it."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for entry in read_scores(run.path / FILE):
        entries.setdefault(entry["name"], []).append(entry)
    return _notes(entries)


def _shown(run: RunFolder, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run's entries of one score the one whose value its tables show; the last one where none is shown."""
    series = run.metrics.get(entries[0]["name"])
    shown = [] if series is None else [e for e in entries if e["value"] == float(series.values[-1])]
    return [*entries, *shown][-1]


def _notes(entries: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, found in entries.items():
        protocols = {entry["protocol"]: entry["record"] for entry in found}
        if len(protocols) > 1:
            (one, first), (two, second), *_ = protocols.items()
            told = f"numbers of {len(protocols)} protocols ({one}, {two}: {'; '.join(differences(first, second))})"
            names.setdefault(told, []).append(name)
    return [f"{', '.join(own)}: {told}; do not compare them" for told, own in names.items()]
