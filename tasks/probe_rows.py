"""The numbers of a probe as a file."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("tap", "t", "measure", "value")


@dataclass(frozen=True)
class Row:
    """One measured number: ``measure`` is ``accuracy``, ``cknna/<encoder>`` or ``cka/<encoder>``."""

    tap: str
    t: float
    measure: str
    value: float


def write_rows(path: Path, rows: list[Row]) -> None:
    """A CSV file that is whole or not there."""
    partial = path.with_suffix(".incomplete")
    with open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((row.tap, row.t, row.measure, repr(row.value)) for row in rows)
    os.replace(partial, path)


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` wrote; none when it is not there."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [Row(r["tap"], float(r["t"]), r["measure"], float(r["value"])) for r in csv.DictReader(file)]


def table_of(rows: list[Row]) -> str:
    """Markdown: for each measure a table of hidden states by times."""
    parts = []
    for measure in sorted({row.measure for row in rows}):
        own = {(row.tap, row.t): row.value for row in rows if row.measure == measure}
        times = list(dict.fromkeys(t for _, t in own))
        lines = [f"| {measure} | " + " | ".join(f"t = {t:g}" for t in times) + " |", "|---|" + "---|" * len(times)]
        for tap in dict.fromkeys(tap for tap, _ in own):
            lines.append(f"| {tap} | " + " | ".join(f"{own[tap, t]:.3f}" for t in times) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
