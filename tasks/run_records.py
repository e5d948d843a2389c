"""One small record of a finished training, for the ledger: JSON, checked when it is read."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from callbacks.score_log import FILE, read_scores
from repalign.errors import UserError, unknown_choice
from repalign.folders import write_text
from tasks.report_data import read_run
from tasks.report_sweep import variant_of

RECORD = "record.json"
FORMAT = 1
_MOST_BYTES = 16 * 2**20
# Where a run lay on its machine: no part of what it was.
_PLACES = ("run_dir", "run_name", "name", "resume", "launcher", "paths.runs", "paths.cache", "paths.root")


@dataclass(frozen=True)
class Point:
    """A score at a step. What was not recorded is None.

    Attributes:
        protocol: hash of how it was measured (:mod:`repalign.metrics.protocol`).
        device_hours: of the training until then.
        flops: of the training until then.
    """

    name: str
    step: int
    value: float
    ci95: float | None = None
    protocol: str | None = None
    device_hours: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """A finished training. What was not recorded is None.

    Attributes:
        recipe: its name.
        variant: what was typed but recipe, seed and names; '' for the recipe as it is.
        command: that repeats it, from a checkout of ``commit``.
        date: day of its start, UTC.
        device: the hardware in words.
        images: pictures of the data: epochs = steps x batch / images.
        device_hours: hours of all GPUs, on a CPU hours of CPU time; scoring left out.
        flops: operations of the training.
        scores: at every step at which there is one.
        note: what a reader has to know.
    """

    recipe: str
    variant: str
    steps: int
    scores: tuple[Point, ...]
    command: str | None = None
    commit: str | None = None
    date: str | None = None
    device: str | None = None
    seed: int | None = None
    batch: int | None = None
    images: int | None = None
    seconds: float | None = None
    device_hours: float | None = None
    flops: float | None = None
    note: str | None = None
    format: int = field(default=FORMAT)

    @property
    def epochs(self) -> float | None:
        """Times that every picture was seen."""
        return None if None in (self.batch, self.images) else self.steps * self.batch / self.images  # type: ignore[operator]


_KINDS = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}


def parse(content: Any, where: str) -> RunRecord:
    """A record from plain JSON.

    Args:
        content: what was read.
        where: file and place, for messages.

    Raises:
        UserError: for a key that is unknown or missing, a value of another kind, or a number that is not finite.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a record, found {type(content).__name__}")
    if content.get("format") != FORMAT:
        raise UserError(f"{where}: format: expected {FORMAT}, found {content.get('format')!r}")
    points = content.get("scores")
    if not isinstance(points, list):
        raise UserError(f"{where}: scores: expected a list, found {type(points).__name__}")
    scores = tuple(Point(**_checked(Point, point, f"{where}: scores[{i}]")) for i, point in enumerate(points))
    rest = _checked(RunRecord, {key: value for key, value in content.items() if key != "scores"}, where)
    if rest["steps"] < 1 or any(rest.get(key) is not None and rest[key] < 1 for key in ("batch", "images")):
        raise UserError(f"{where}: steps, batch, images: expected 1 or more")
    return RunRecord(**rest, scores=scores)


def _checked(kind: type, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a mapping, found {type(content).__name__}")
    known = {f.name: f for f in fields(kind) if f.name != "scores"}
    for key, value in content.items():
        if key not in known:
            raise unknown_choice(where, str(key), known, "key")
        expected = _KINDS[str(known[key].type)]
        if not isinstance(value, expected) or isinstance(value, bool):
            raise UserError(f"{where}: {key}: expected {known[key].type}, found {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {key}: expected a finite number, found {value}")
    missing = [name for name in ("recipe", "variant", "steps", "name", "step", "value") if name in known]
    for name in missing:
        if name not in content:
            raise UserError(f"{where}: {name}: is missing")
    return content


def as_json(record: RunRecord) -> dict[str, Any]:
    """Plain values; what is None is left out."""
    plain = {key: value for key, value in asdict(record).items() if value is not None and key != "scores"}
    points = [{key: value for key, value in asdict(point).items() if value is not None} for point in record.scores]
    return {**plain, "scores": points}


def read_records(path: Path) -> list[RunRecord]:
    """The records of a file: a list of them.

    Raises:
        UserError: with file, place and key, when it is not what :func:`write_records` writes.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise UserError(f"'{path}': expected at most {_MOST_BYTES >> 20} MiB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no JSON ({type(error).__name__})") from error
    if not isinstance(content, list):
        raise UserError(f"'{path}': expected a list of records, found {type(content).__name__}")
    return [parse(entry, f"'{path}': record {place}") for place, entry in enumerate(content)]


def write_records(records: Sequence[RunRecord], path: Path) -> None:
    """A list, a line per record; whole or not there."""
    lines = ",\n".join(json.dumps(as_json(record), ensure_ascii=False, allow_nan=False) for record in records)
    write_text(path, f"[\n{lines}\n]\n")


def write_record_of(folder: Path) -> RunRecord:
    """Write the record of a finished run into its folder."""
    record = record_of(folder)
    text = json.dumps(as_json(record), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / RECORD, text + "\n")
    return record


def record_of(folder: Path) -> RunRecord:
    """The record of a finished run, from what it left in its folder.

    Raises:
        UserError: when the run is not finished.
    """
    run = read_run(folder)
    if run.record.get("status") != "finished":
        raise UserError(f"'{folder}': the run is not finished ({run.record.get('status', 'no run.json')})")
    config = run.config
    protocols = {(line["name"], line.get("step")): line for line in read_scores(folder / FILE)}
    costs = {kind: run.cost(kind) for kind in ("device_hours", "flops")}
    known = {kind: dict(zip(s.steps.tolist(), s.values.tolist(), strict=True)) for kind, s in costs.items()}
    points = []
    for name, series in run.metrics.items():
        for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
            told = protocols.get((name, step), {})
            cost = {kind: values.get(step) for kind, values in known.items()}
            points.append(Point(name, int(step), value, told.get("ci95"), told.get("protocol"), **cost))
    words = [word for word in run.overrides if word.lstrip("+").partition("=")[0] not in _PLACES]
    recipes = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    return RunRecord(
        recipe=recipes[-1] if recipes else str(config.get("name")),
        variant=variant_of([word for word in words if not word.startswith("experiment=")], none=""),
        steps=int(run.record["step"]),
        scores=tuple(points),
        command=shlex.join(["python", "run.py", *words]) if words else None,
        commit=run.record.get("commit"),
        date=str(run.record.get("started", ""))[:10] or None,
        device=run.record.get("hardware"),
        seed=config.get("seed"),
        batch=(config.get("data") or {}).get("batch_size"),
        images=run.record.get("images"),
        seconds=run.total("seconds"),
        device_hours=run.total("device_hours"),
        flops=run.total("flops"),
    )
