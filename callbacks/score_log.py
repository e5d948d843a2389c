"""Scores with their protocols in ``metrics.jsonl``: a line per number, appended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repalign.metrics.protocol import differences, hash_of, protocol_of
from repalign.metrics.suite import FeatureMetrics, SeveralFeatures, spaces_of

FILE = "metrics.jsonl"


def score_lines(
    metrics: FeatureMetrics | SeveralFeatures,
    values: Mapping[str, float],
    drawing: Mapping[str, Any],
    step: int | None,
) -> list[dict[str, Any]]:
    """One entry per score.

    Args:
        metrics: that gave the values, before it forgets the pictures.
        values: of ``metrics.compute()``.
        drawing: how the pictures were drawn (:func:`repalign.metrics.protocol.protocol_of`).
        step: of the training; None when it is not known.
    """
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    lines = []
    for space in spaces_of(metrics).values():
        record = protocol_of(space, drawing)
        lines += [
            {
                "date": date,
                "step": step,
                "name": name,
                "value": values[name],
                "std": values.get(f"{name}_std"),
                "ci95": values.get(f"{name}_ci95"),
                "protocol": hash_of(record),
                "record": record,
            }
            for name in space.scores
        ]
    return lines


def append_scores(path: Path, lines: list[dict[str, Any]]) -> list[str]:
    """Append entries to a file; says which of them cannot be compared with the last ones of the same names there.

    Returns:
        One warning per protocol that differs: the scores it concerns, both hashes and what differs.
    """
    before = {line["name"]: line for line in read_scores(path)}
    warnings: dict[str, str] = {}
    for line in lines:
        last = before.get(line["name"])
        if last is None or last["protocol"] == line["protocol"]:
            continue
        told = "; ".join(differences(last["record"], line["record"]))
        key = f"{last['protocol']} {line['protocol']}"
        names = f"{warnings[key].split(':')[0]}, {line['name']}" if key in warnings else line["name"]
        warnings[key] = (
            f"{names}: the last number in {path.name} has protocol {last['protocol']}, this one {line['protocol']}; "
            f"they cannot be compared ({told})"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, default=str) + "\n" for line in lines)
    return list(warnings.values())


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, torn lines left out; none when it is not there."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"name", "value", "protocol", "record"} <= entry.keys():
            found.append(entry)
    return found


def shown(values: Mapping[str, float]) -> list[str]:
    """``name value ± half the interval`` for each score; deviations between parts are left out."""
    rows = []
    for name, value in values.items():
        if name.endswith(("_std", "_ci95")):
            continue
        interval = values.get(f"{name}_ci95")
        rows.append(f"{name} {value:.4g}" + (f" ± {interval:.2g}" if interval is not None else ""))
    return rows
