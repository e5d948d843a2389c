"""Runs of a sweep, grouped into variants that differ by their overrides and not by their seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.report_data import RunFolder, Series, higher_is_better, is_run, read_run

# Overrides that name a run and do not change what is trained.
_NAMES = ("seed", "run_name", "name", "run_dir", "resume", "launcher")


@dataclass(frozen=True)
class Variant:
    """Runs that differ by their seed alone."""

    label: str
    runs: list[RunFolder]


@dataclass(frozen=True)
class Summary:
    """A score over the seeds of a variant at their last steps."""

    mean: float
    std: float | None
    count: int
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Band:
    """A score over the seeds of a variant at the steps that all of them have, or at what these steps have cost."""

    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray | None


def runs_below(folder: Path) -> list[RunFolder]:
    """Every run folder below a folder, by name, jobs by number; run folders inside run folders are not looked for."""
    found: list[RunFolder] = []
    for path in sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: (len(p.name) * p.name.isdigit(), p)):
        found += [read_run(path)] if is_run(path) else runs_below(path)
    return found


def variants_of(runs: Sequence[RunFolder]) -> list[Variant]:
    """Group by what differs between the command lines, seeds aside. A run without a command line stands alone."""
    words = [_as_mapping(run.overrides) for run in runs]
    keys = sorted({key for mapping in words for key in mapping})
    differing = [key for key in keys if len({mapping.get(key) for mapping in words}) > 1]
    grouped: dict[str, list[RunFolder]] = {}
    for run, mapping in zip(runs, words, strict=True):
        parts = [f"{key}={mapping[key]}" for key in differing if key in mapping]
        label = " ".join(parts) or ("as composed" if run.overrides else run.path.name)
        grouped.setdefault(label, []).append(run)
    return [Variant(label, members) for label, members in grouped.items()]


def variant_of(overrides: Sequence[str], none: str = "as composed") -> str:
    """A run's own words, without its seed and its names; ``none`` where there are none."""
    return " ".join(f"{key}={value}" for key, value in _as_mapping(overrides).items()) or none


def _as_mapping(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (word.partition("=") for word in overrides)
    return {key.lstrip("+~"): value for key, _, value in pairs if key.lstrip("+~") not in _NAMES}


def summary(variant: Variant, metric: str) -> Summary | None:
    """Mean and standard deviation (divisor n - 1) of a score at the last step of each seed; None when none has it."""
    series = [run.metrics[metric] for run in variant.runs if metric in run.metrics]
    if not series:
        return None
    last = np.array([s.values[-1] for s in series])
    steps = tuple(sorted({int(s.steps[-1]) for s in series}))
    return Summary(float(last.mean()), float(last.std(ddof=1)) if len(last) > 1 else None, len(last), steps)


def band(variant: Variant, metric: str, against: str = "step") -> Band | None:
    """Mean and deviation over the seeds at their common steps; None when there is no such step.

    Args:
        variant: the runs.
        metric: name of the score.
        against: ``step``, or a cost (:meth:`RunFolder.cost`) whose mean over the seeds takes the step's place.
    """
    runs = [run for run in variant.runs if metric in run.metrics]
    of_steps = [set(run.metrics[metric].steps.tolist()) for run in runs]
    if against != "step":
        of_steps += [set(run.cost(against).steps.tolist()) for run in runs]
    steps = np.array(sorted(set.intersection(*of_steps))) if runs else np.array([])
    if not len(steps):
        return None
    rows = np.array([_at(run.metrics[metric], steps) for run in runs])
    places = steps if against == "step" else np.mean([_at(run.cost(against), steps) for run in runs], axis=0)
    return Band(places, rows.mean(0), rows.std(0, ddof=1) if len(rows) > 1 else None)


def _at(series: Series, steps: np.ndarray) -> np.ndarray:
    return series.values[np.searchsorted(series.steps, steps)]


def ranked(variants: Sequence[Variant], metric: str | None) -> list[Variant]:
    """The best mean first; variants without the score last."""

    def place(variant: Variant) -> float:
        found = None if metric is None else summary(variant, metric)
        return np.inf if found is None else -found.mean if higher_is_better(str(metric)) else found.mean

    return sorted(variants, key=place)


def cost_of(variant: Variant, kind: str) -> float | None:
    """Mean over the seeds of what a training has cost; None unless all of them have logged it."""
    totals = [run.total(kind) for run in variant.runs]
    return None if None in totals else float(np.mean([total for total in totals if total is not None]))


def hours_word(runs: Sequence[RunFolder]) -> str:
    """``CPU-hours``, ``GPU-hours``, or ``device-hours`` where both took part."""
    kinds = {"CPU" if str(run.record.get("hardware", "")).startswith("CPU") else "GPU" for run in runs}
    return f"{kinds.pop()}-hours" if len(kinds) == 1 else "device-hours"
