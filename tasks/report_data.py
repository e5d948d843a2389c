"""A run folder as data for its report. What is missing is noted, not fatal."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

_GRID = re.compile(r"step_(\d+)_(raw|ema)\.png$")
# Scores that grow with quality; all others fall (distances, losses).
_HIGHER = ("is", "precision", "recall", "clip", "density", "coverage", "psnr", "ssim")
# Names that were logged by older versions, and what they are called now.
_RENAMED = {
    "metric/": "eval/",
    "evaluation/": "eval/checkpoint/",
    "time/": "throughput/phase_seconds/",
    "train/images_per_second": "throughput/images_per_second",
}


@dataclass(frozen=True)
class Series:
    """One logged quantity: finite values at rising steps."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Grid:
    """A sample grid."""

    step: int
    kind: str
    path: Path


@dataclass
class RunFolder:
    """What a run left behind.

    Attributes:
        path: the folder.
        config: the composed configuration.
        text: the same as YAML, for showing.
        overrides: the words of the command line.
        series: logged quantities by name.
        grids: sample grids, by step.
        record: ``run.json``: status, times, hardware, versions, commit.
        evaluation: ``evaluation.json`` of task=evaluate.
        missing: one sentence for each thing that was not found.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    overrides: list[str] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Name of the recipe, else of the folder."""
        return str(self.config.get("name") or self.path.name)

    @property
    def metrics(self) -> dict[str, Series]:
        """Scores of the training, and those that task=evaluate alone has; without deviations and intervals."""
        own = {n.removeprefix("eval/"): s for n, s in self.series.items() if n.startswith("eval/")}
        found = {name: series for name, series in own.items() if not name.startswith(("checkpoint/", "cost/"))}
        later = {n.removeprefix("checkpoint/"): s for n, s in own.items() if n.startswith("checkpoint/")}
        found |= {name: series for name, series in later.items() if name not in found}
        return {name: series for name, series in found.items() if not name.endswith(("_std", "_ci95"))}

    def cost(self, kind: str) -> Series:
        """What the training had cost at the steps of its scores; empty where that was not logged.

        Args:
            kind: ``seconds``, ``device_hours`` or ``flops``.
        """
        return self.series.get(f"eval/cost/{kind}", Series(np.array([]), np.array([])))

    def total(self, kind: str) -> float | None:
        """What the whole training has cost; None where that was not logged."""
        known = self.series.get(f"throughput/{kind}")
        return None if known is None else float(known.values[-1])

    def spread(self, metric: str) -> Series | None:
        """Deviation that was logged beside a score."""
        return self.series.get(f"eval/{metric}_std")

    @property
    def last_step(self) -> int:
        """The highest step that anything was logged at."""
        return max((int(s.steps[-1]) for s in self.series.values()), default=0)


def is_run(folder: Path) -> bool:
    """Whether a folder was written by a training."""
    return any((folder / name).is_file() for name in ("metrics.csv", "config.yaml", "run.json"))


class _Plain(yaml.SafeLoader):
    """YAML without aliases: no run writes them, and a few lines of them stand for more than the memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "found an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def _yaml(text: str) -> Any:
    return yaml.load(text, _Plain)  # noqa: S506  (a SafeLoader)


def read_run(folder: Path) -> RunFolder:
    """Everything of a run folder that can be read."""
    run = RunFolder(folder)
    config = _read(run, "config.yaml", "the composed configuration", _yaml)
    run.config = config if isinstance(config, dict) else {}
    run.text = (folder / "config.yaml").read_text(encoding="utf-8") if run.config else ""
    overrides = _read(run, "overrides.yaml", "the command line", _yaml)
    run.overrides = [str(word) for word in overrides] if isinstance(overrides, list) else []
    record = _read(run, "run.json", "status, hardware and versions", json.loads)
    run.record = record if isinstance(record, dict) else {}
    if (folder / "evaluation.json").is_file():
        evaluation = _read(run, "evaluation.json", "the evaluation", json.loads)
        run.evaluation = evaluation if isinstance(evaluation, dict) else {}
    run.series = _read(run, "metrics.csv", "the curves", read_series) or {}
    inside = (p for p in (folder / "samples").glob("step_*.png") if not p.is_symlink())
    found = ((_GRID.search(p.name), p) for p in inside)
    run.grids = sorted((Grid(int(m[1]), m[2], p) for m, p in found if m), key=lambda g: (g.step, g.kind))
    if not run.grids:
        run.missing.append("samples/: no sample grids were drawn")
    if run.series and not run.metrics:
        run.missing.append("metrics.csv: no scores (eval/...); the run was not evaluated")
    return run


def _read(run: RunFolder, name: str, what: str, parse: Any) -> Any:
    try:
        return parse((run.path / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        run.missing.append(f"{name}: not there; {what} cannot be shown")
    except (ValueError, OSError, RecursionError, csv.Error, yaml.YAMLError) as error:
        run.missing.append(f"{name}: cannot be read ({' '.join(str(error).split())[:120]}); {what} cannot be shown")
    return None


def read_series(text: str) -> dict[str, Series]:
    """Curves from tidy CSV (step, name, value). Torn lines are skipped; a step logged twice keeps its last value."""
    points: dict[str, dict[int, float]] = {}
    for row in csv.reader(text.splitlines()):
        try:
            step, name, value = int(row[0]), renamed(row[1]), float(row[2])
        except (ValueError, IndexError):
            continue
        if math.isfinite(value) and abs(step) < 2**53:
            points.setdefault(name, {})[step] = value
    ordered = {name: sorted(values.items()) for name, values in points.items()}
    return {n: Series(np.array([s for s, _ in rows]), np.array([v for _, v in rows])) for n, rows in ordered.items()}


def renamed(name: str) -> str:
    """Today's name of what was logged by an older version."""
    for before, now in _RENAMED.items():
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name


def higher_is_better(metric: str) -> bool:
    """Whether a score grows with quality."""
    return metric.removeprefix("rec_").split("_")[0] in _HIGHER


def attributions(run: RunFolder) -> list[str]:
    """Licence lines that go with the pictures: the run's own record, else the manifest of the store that it read."""
    if run.record.get("attribution"):
        return [str(run.record["attribution"])]
    data, paths = run.config.get("data") or {}, run.config.get("paths") or {}
    cache = data.get("cache_root") or paths.get("cache")
    words = str(data.get("_target_", "")).lower().split(".")
    if not cache or len(words) < 2:
        return []
    # datamodules.openmoji.X reads stores below <cache>/openmoji-...
    found = (_info(path).get("attribution") for path in Path(cache).glob(f"{words[-2]}*/**/manifest.json"))
    return sorted({str(text) for text in found if text})


def _info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8")).get("info")
    except (ValueError, OSError, AttributeError):
        return {}  # the data module reports a torn store itself; a report only quotes it
    return info if isinstance(info, dict) else {}
