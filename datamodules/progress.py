"""A progress bar for work on a whole data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]

_SECONDS = 20.0


def first_rank() -> bool:
    """Whether this process speaks for all; by the environment, so also before a trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar on a terminal, a plain line every 20 seconds elsewhere, nothing on ranks other than 0.

    Yields:
        A function that moves the bar by so many.
    """
    console = Console()
    if not first_rank():
        yield lambda steps: None
    elif console.is_terminal:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda steps: bar.update(task, advance=steps)
    else:
        lines = _Lines(title, total, done)
        yield lines.advance
        lines.finish()


class _Lines:
    """The plain form: where no terminal is, a bar would fill the log."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.began = self.spoke = time.perf_counter()

    def advance(self, steps: int) -> None:
        self.done += steps
        if time.perf_counter() - self.spoke > _SECONDS:
            self.spoke = time.perf_counter()
            print(f"{self.title}: {self.done}/{self.total}", flush=True)

    def finish(self) -> None:
        print(f"{self.title}: {self.total} in {time.perf_counter() - self.began:.1f} s", flush=True)
