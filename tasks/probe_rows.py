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
