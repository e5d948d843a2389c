"""Where the time of a step goes, without stopping the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Splits the time of steps among named regions, which may lie inside each other.

    A region's time is its own: what an inner region takes is left out, so the regions of a step sum to the step. On a
    GPU the moments are events in its queue, read when all is over: no step waits, and a region's time is the device's.
    Any other count that only grows (operations) can take the place of time by ``now`` and ``between``.

    Args:
        device: whose time is measured.
        now: a moment; None for the clock of the device.
        between: from two moments to what passed; with ``now``.
    """

    def __init__(
        self,
        device: torch.device,
        now: Callable[[], Any] | None = None,
        between: Callable[[Any, Any], float] | None = None,
    ) -> None:
        on_gpu = device.type == "cuda"
        self._now = now or (_event if on_gpu else time.perf_counter)
        self._between = between or (_seconds_between if on_gpu and now is None else _difference)
        self._open = ["other"]
        self._marks: list[tuple[Any, str, bool]] = []

    def begin(self, base: str = "other") -> None:
        """Forget what was measured; a step begins, outside every region, in ``base``."""
        self._open = [base]
        self._marks = [(self._now(), base, True)]

    def base(self, name: str) -> None:
        """What is outside every region counts as ``name`` from here on."""
        self._open[0] = name
        self._mark()

    def enter(self, name: str) -> None:
        """A region begins."""
        self._open.append(name)
        self._mark()

    def leave(self) -> None:
        """The innermost region ends."""
        self._open.pop()
        self._mark()

    def step(self) -> None:
        """A step ends and the next one begins."""
        self._mark(True)

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Inside, time counts as ``name``."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, fn: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``fn``, whose time counts as ``name``."""

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.region(name):
                return fn(*args, **kwargs)

        return call

    def read(self) -> list[dict[str, float]]:
        """What every finished step took, by region; waits for the device."""
        steps: list[dict[str, float]] = []
        if not self._marks:
            return steps
        last = self._marks[-1][0]
        if isinstance(last, torch.cuda.Event):
            last.synchronize()
        taken: dict[str, float] = {}
        for (before, name, _), (after, _, ends) in zip(self._marks, self._marks[1:], strict=False):
            taken[name] = taken.get(name, 0.0) + self._between(before, after)
            if ends:
                steps.append(taken)
                taken = {}
        return steps

    def _mark(self, ends: bool = False) -> None:
        self._marks.append((self._now(), self._open[-1], ends))


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    return before.elapsed_time(after) / 1000


def _difference(before: float, after: float) -> float:
    return after - before
