"""Jobs of a sweep: what is finished is not run again, and no folder is continued with another composition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repalign.errors import UserError
from repalign.folders import write_text

RECORD = "job.json"
# Where a job lies, how it begins and what is read of it afterwards: two compositions that differ in these are the same.
_PLACES = ("run_dir", "run_name", "resume", "overrides", "score")


def composition(cfg: DictConfig) -> dict[str, Any]:
    """What a job computes, resolved, without the names of its folders."""
    plain = cfg.copy()
    for key in _PLACES:
        plain[key] = None
    for key in ("root", "cache", "runs"):
        plain.paths[key] = key
    found = OmegaConf.to_container(plain, resolve=True)
    assert isinstance(found, dict)
    return json.loads(json.dumps(found))  # as it is read back: tuples as lists, keys as texts


def begin(cfg: DictConfig) -> bool:
    """Whether this job is finished; otherwise its folder is now marked as the one of this composition.

    A finished job may go on with more ``steps``, as a single run may.

    Raises:
        UserError: when the folder belongs to another composition; the line names the first key that differs.
    """
    folder = Path(cfg.run_dir)
    now, before = composition(cfg), _read(folder)
    if before is not None:
        held = before["composition"]
        more = cfg.copy()
        more.steps = held["steps"]
        if composition(more) != held:
            key, was, found = _first_difference(held, composition(more))
            raise UserError(
                f"run_name: '{folder}' holds a job of another composition ({key} was {was!r}, is {found!r}); "
                "choose another run_name, or remove the folder"
            )
        if before["finished"] and cfg.steps <= held["steps"]:
            return True
    _write(folder, now, finished=False)
    return False


def finish(cfg: DictConfig) -> None:
    """Mark the job as finished."""
    _write(Path(cfg.run_dir), composition(cfg), finished=True)


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
        held = {"composition": dict(found["composition"]), "finished": bool(found["finished"])}
        if type(held["composition"]["steps"]) is not int:
            raise TypeError("steps")
        return held
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{file}' cannot be read ({type(error).__name__}); remove it to run this job again") from error


def _write(folder: Path, content: dict[str, Any], finished: bool) -> None:
    # Every process of a job writes it, and they write the same.
    write_text(folder / RECORD, json.dumps({"finished": finished, "composition": content}, indent=1))


def _first_difference(before: Any, after: Any, key: str = "") -> tuple[str, Any, Any]:
    """Key and both values of the first leaf that differs."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return key, before, after
    name = next(name for name in [*before, *after] if before.get(name) != after.get(name))
    return _first_difference(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
