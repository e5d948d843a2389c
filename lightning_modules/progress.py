"""Where a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Number of finished optimizer rounds.

    Lightning's ``global_step`` counts every optimizer, so with two optimizers it runs twice as fast; schedules,
    checkpoints, logs and the data position go by this counter.
    """

    step: int = 0

    def advance(self) -> None:
        """One round is done."""
        self.step += 1
