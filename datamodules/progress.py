"""A progress bar for work on a whole data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int], None]

_SECONDS = 20.0

_sink: Advance | None = None


def report_to(sink: Advance) -> None:
    """Let whatever this process does move a bar elsewhere: a worker process reports to the one that started it."""
    global _sink
    _sink = sink


def first_rank() -> bool:
    """Whether this process speaks for all; by the environment, so also before a trainer exists."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar on a terminal, a plain line every 20 seconds elsewhere, nothing on ranks other than 0.

    Both show how many of how many, how many a second, and the time that is left at that rate.

    Yields:
        A function that moves the bar by so many.
    """
    console = Console()
    if _sink is not None:
        yield _sink
    elif not first_rank():
        yield lambda steps: None
    elif console.is_terminal:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn())
        columns = (*columns, _Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda steps: bar.update(task, advance=steps)
    else:
        lines = _Lines(title, total, done)
        yield lines.advance
        lines.finish()


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g}/s")


class _Lines:
    """The plain form: where no terminal is, a bar would fill the log."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title = title
        self.total = total
        self.done = self.found = done
        self.began = self.spoke = time.perf_counter()

    def advance(self, steps: int) -> None:
        self.done += steps
        now = time.perf_counter()
        if now - self.spoke > _SECONDS:
            self.spoke = now
            told = f"{self.title}: {self.done}/{self.total} ({self.done / self.total:.0%})"
            if rate := self.rate(now):
                minutes, seconds = divmod(round((self.total - self.done) / rate), 60)
                told += f", {rate:.3g}/s, {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
            print(told, flush=True)

    def rate(self, now: float) -> float:
        # What was there at the start says nothing of the speed.
        return (self.done - self.found) / max(now - self.began, 1e-9)

    def finish(self) -> None:
        now = time.perf_counter()
        print(f"{self.title}: {self.total} in {now - self.began:.1f} s ({self.rate(now):.3g}/s)", flush=True)
