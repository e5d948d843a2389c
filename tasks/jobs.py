"""Jobs of a sweep: what is finished is not run again, and no folder is continued with another composition."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repalign.errors import UserError
from repalign.folders import write_text

RECORD = "job.json"
# Where a job lies, how it begins and what is read of it afterwards: two compositions that differ in these are the same.
_PLACES = ("run_dir", "run_name", "resume", "overrides", "score")


# How many work on it: batches and draws do not depend on that.
_HANDS = (("trainer", "devices"), ("trainer", "num_nodes"), ("data", "num_workers"))


def composition(cfg: DictConfig) -> dict[str, Any]:
    """What a job computes, resolved, without the names of its folders and the number of its processes."""
    plain = cfg.copy()
    for key in _PLACES:
        plain[key] = None
    for key in ("root", "cache", "runs"):
        plain.paths[key] = key
    found = OmegaConf.to_container(plain, resolve=True)
    assert isinstance(found, dict)
    return _without_hands(json.loads(json.dumps(found)))  # as it is read back: tuples as lists, keys as texts


def _without_hands(plain: dict[str, Any]) -> dict[str, Any]:
    for part, option in _HANDS:
        if isinstance(plain.get(part), dict):
            plain[part].pop(option, None)
    return plain


@dataclass(frozen=True)
class Record:
    """What a job's folder says of it."""

    steps: int
    finished: bool


def look(cfg: DictConfig) -> Record | None:
    """What this job's folder says of it; None where no job has begun. Other ``steps`` are no other job.

    Raises:
        UserError: when the folder belongs to another composition; the line names the first key that differs.
    """
    folder = Path(cfg.run_dir)
    before = _read(folder)
    if before is None:
        return None
    held = before["composition"]
    same = cfg.copy()
    same.steps = held["steps"]
    now = composition(same)
    if now != held:
        key, was, found = _first_difference(held, now)
        raise UserError(
            f"run_name: '{folder}' holds a job of another composition ({key} was {was!r}, is {found!r}); "
            "choose another run_name, or remove the folder"
        )
    return Record(held["steps"], before["finished"])


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished job, whichever."""
    held = _read(folder)
    return held is not None and held["finished"]


def mark(cfg: DictConfig, *, finished: bool) -> None:
    """Write into the folder which job is in it."""
    # Every process of a job writes it, and they write the same.
    content = {"finished": finished, "composition": composition(cfg)}
    write_text(Path(cfg.run_dir) / RECORD, json.dumps(content, indent=1))


def begin(cfg: DictConfig) -> bool:
    """Whether this job is finished; otherwise its folder is now marked as the one of this composition.

    A finished job may go on with more ``steps``, as a single run may.

    Raises:
        UserError: as :func:`look`.
    """
    found = look(cfg)
    if found is not None and found.finished and cfg.steps <= found.steps:
        return True
    mark(cfg, finished=False)
    return False


def finish(cfg: DictConfig) -> None:
    """Mark the job as finished."""
    mark(cfg, finished=True)


def score_of(cfg: DictConfig) -> float | None:
    """The last value of ``score`` in the job's metrics.csv, which a search compares; None when no score is named.

    Raises:
        UserError: when the run has no number of this name.
    """
    if cfg.score is None:
        return None
    from tasks.report_data import read_series

    file = Path(cfg.run_dir) / "metrics.csv"
    series = read_series(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if cfg.score not in series:
        known = ", ".join(sorted(series)) or "none"
        raise UserError(f"score: '{file}' has no finite '{cfg.score}'; it has: {known}")
    value = float(series[cfg.score].values[-1])
    assert math.isfinite(value), "read_series keeps finite values alone"
    return value


def _read(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        held = {"composition": _without_hands(dict(found["composition"])), "finished": bool(found["finished"])}
        if type(held["composition"]["steps"]) is not int:
            raise TypeError("steps")
        return held
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{file}' cannot be read ({type(error).__name__}); remove it to run this job again") from error


def _first_difference(before: Any, after: Any, key: str = "") -> tuple[str, Any, Any]:
    """Key and both values of the first leaf that differs."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return key, before, after
    name = next(name for name in [*before, *after] if before.get(name) != after.get(name))
    return _first_difference(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
