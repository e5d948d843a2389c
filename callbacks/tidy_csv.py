"""Metrics as a CSV file that a resumed run can continue."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

HEADER = ["step", "name", "value"]


class TidyCSVLogger(Logger):
    """``metrics.csv`` in tidy form (step, name, value), appended and flushed at every call.

    Lightning's ``CSVLogger`` deletes the old file on resume and rewrites all rows when a new column comes; here a new
    metric is only a new row. :meth:`rewind` drops the rows after the step from which a run resumes.
    """

    def __init__(self, save_dir: str, name: str = "metrics.csv") -> None:
        super().__init__()
        self.path = Path(save_dir) / name

    @property
    def name(self) -> str:
        """Lightning's name of this log."""
        return "csv"

    @property
    def version(self) -> str:
        """One file per run folder."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The composed config lies beside the file; nothing to add."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row per metric."""
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(HEADER)
            writer.writerows([step, name, repr(float(value))] for name, value in metrics.items())

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``: the resumed run will log it again. Torn last lines go too."""
        if not self.path.exists():
            return
        with open(self.path, newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        partial = self.path.with_suffix(".incomplete")
        with open(partial, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            writer.writerows(rows)
        os.replace(partial, self.path)
