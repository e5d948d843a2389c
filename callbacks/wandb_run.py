"""A W&B run that a resumed training continues, with no step in it twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

AGAIN = "eval/checkpoint/"  # of task=evaluate: any step, as often as it is asked for


class WandbRun(WandbLogger):
    """Lightning's logger, which remembers what it has logged.

    A killed training goes on from its checkpoint and takes the steps after it again. They come to the same numbers,
    and W&B takes nothing back: so what was logged at a step, or later, under the same name is left out. The memory is
    ``wandb/logged.json`` in the run folder, written before each row: a kill in between loses a row, never doubles one.
    After a roll-back of the guard, whose steps come to other numbers, W&B keeps the old ones up to the step of the
    collapse; ``metrics.csv`` has the new ones.

    Args:
        save_dir: the run folder.
        options: of :class:`lightning.pytorch.loggers.WandbLogger`.
    """

    def __init__(self, save_dir: str, **options: Any) -> None:
        super().__init__(save_dir=save_dir, **options)
        self._memory = Path(save_dir) / "wandb" / "logged.json"
        self._logged: dict[str, int] = {}
        if self._memory.is_file():
            self._logged = {str(name): int(step) for name, step in json.loads(self._memory.read_text()).items()}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log what is new: numbers, and pictures and tables, which come here too."""
        if step is None:
            return super().log_metrics(metrics)
        new = {n: value for n, value in metrics.items() if n.startswith(AGAIN) or self._logged.get(n, -1) < step}
        if not new:
            return
        self._logged |= {name: step for name in new if not name.startswith(AGAIN)}
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        partial = self._memory.with_suffix(".incomplete")
        partial.write_text(json.dumps(self._logged), encoding="utf-8")
        os.replace(partial, self._memory)
        super().log_metrics(new, step)

    @rank_zero_only
    def log_samples(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """A table whose cells are words, numbers, and pictures as arrays [Y, X, 3]."""
        import wandb

        shown = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
        self.log_table(key, columns=list(columns), data=shown, step=step)
