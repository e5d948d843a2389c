"""task=ledger: experiments/ledger.md, drawn from the committed records of runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from repalign.errors import UserError
from repalign.folders import write_text
from tasks.report_data import higher_is_better, is_run
from tasks.report_files import markdown
from tasks.report_leaderboard import quantity
from tasks.run_records import RunRecord, read_records, record_of, write_records

RECORDS, LEDGER = "runs.json", "ledger.md"
_MOST_SCORES = 3  # columns
_HEAD = """# Ledger

Every training whose record is committed: its scores at the last step, and what it has cost. Drawn by
`python run.py task=ledger` from `experiments/*/runs.json`, not by hand. To run an entry again: check out its commit,
then type its command.

Mean ± standard deviation over the seeds. Epochs: steps x batch / pictures. Hours and FLOPs: of one training, scoring
left out; hours on a CPU are hours of CPU time. Protocol: how a score was measured; numbers of different protocols, or
of none, cannot be compared. An empty cell was not recorded.
"""


def run(cfg: DictConfig) -> None:
    """Take in the records of ``task.add`` as ``task.study``, if they are given, then draw the ledger.

    Raises:
        UserError: one line for a folder without finished runs, a run of uncommitted code, or a file that is no record.
    """
    folder = Path(cfg.task.folder)
    if (cfg.task.add is None) != (cfg.task.study is None):
        raise UserError("task.add, task.study: give both (a folder of runs, and the study they belong to) or none")
    if cfg.task.add is not None:
        count = take_in(Path(cfg.task.add), folder / str(cfg.task.study))
        print(f"{count} records in {folder / str(cfg.task.study) / RECORDS}", flush=True)
    write_text(folder / LEDGER, ledger_of(folder))
    print(f"wrote {folder / LEDGER}", flush=True)


def take_in(runs: Path, study: Path) -> int:
    """Add the finished runs below a folder to a study's records; a run that is there already is replaced.

    Returns:
        Records of the study.

    Raises:
        UserError: when there is no run, one is not finished, or was run from code that is in no commit.
    """
    found = [record_of(path) for path in _runs_in(runs)]
    if not found:
        raise UserError(f"task.add: no run below '{runs}' (looked for metrics.csv, config.yaml, run.json)")
    for record in found:
        if record.commit is None or record.commit.endswith("+"):
            raise UserError(
                f"task.add: {record.recipe} was run from commit {record.commit}: nobody can check that out; commit "
                "first, then run it again"
            )
    study.mkdir(parents=True, exist_ok=True)
    file = study / RECORDS
    new = {_identity(record) for record in found}
    kept = [r for r in read_records(file) if _identity(r) not in new] if file.is_file() else []
    write_records([*kept, *found], file)
    return len(kept) + len(found)


def _runs_in(folder: Path) -> list[Path]:
    if is_run(folder):
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [run for path in inside for run in _runs_in(path)]


def _identity(record: RunRecord) -> tuple[Any, ...]:
    return record.recipe, record.variant, record.seed, record.steps, record.commit


def ledger_of(folder: Path) -> str:
    """The ledger as Markdown, a section per study that has records.

    Raises:
        UserError: when a file of records is not one.
    """
    sections = [
        section_of(file.parent.name, read_records(file), (file.parent / "README.md").is_file())
        for file in sorted(folder.glob(f"*/{RECORDS}"))
    ]
    return "\n".join([_HEAD, *sections])


def section_of(study: str, records: Sequence[RunRecord], page: bool) -> str:
    """A table of the entries of a study, the best first, and their commands."""
    scores = list(dict.fromkeys(point.name for record in records for point in record.scores))[:_MOST_SCORES]
    entries: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in records:
        entries.setdefault((record.recipe, record.variant, _seedless(record.command), record.commit), []).append(record)
    ordered = sorted(entries.values(), key=lambda own: _place(own, scores))
    devices = list(dict.fromkeys(record.device for record in records if record.device))
    gpu = [not str(device).startswith("CPU") for device in devices]
    hours = "GPU-hours" if gpu and all(gpu) else "CPU-hours" if not any(gpu) else "device-hours"
    heads = ["recipe", "what differs", "seeds", *(f"`{name}`" for name in scores)]
    heads += ["steps", "epochs", hours, "FLOPs", "protocol", "commit", "date"]
    lines = [f"## {markdown(study)}", ""]
    if page:
        lines += [f"What was asked and what it says: [{study}]({study}/README.md).", ""]
    lines += [f"Device: {markdown('; '.join(map(str, devices)) or 'not recorded')}.", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(_cells(own, scores))} |" for own in ordered]
    commands: dict[str, list[str]] = {}
    for own in ordered:
        command = _seedless(own[0].command)
        if command is not None:
            seeds = sorted({record.seed for record in own if record.seed is not None})
            typed = command if own[0].command == command else f"{command} seed={','.join(map(str, seeds))}"
            typed = typed.replace("run.py", "run.py -m", 1) if typed != command and len(seeds) > 1 else typed
            commands.setdefault(f"git checkout {str(own[0].commit).split(' ')[0]} && {typed}", [])
    lines += ["", "```", *commands, "```", ""] if commands else [""]
    notes = dict.fromkeys(record.note for record in records if record.note)
    lines += [line for note in notes for line in (markdown(note), "")]
    return "\n".join(lines)


def _cells(own: Sequence[RunRecord], scores: Sequence[str]) -> list[str]:
    first = own[0]
    protocols = dict.fromkeys(p.protocol for r in own for p in _last(r) if p.name in scores and p.protocol)
    return [
        f"`{markdown(first.recipe)}`",
        markdown(first.variant),
        str(len(own)),
        *(_spread([p.value for r in own for p in _last(r) if p.name == name], "{:.4g}") for name in scores),
        f"{first.steps:,}",
        "" if first.epochs is None else f"{first.epochs:.1f}",
        _cost([record.device_hours for record in own]),
        _cost([record.flops for record in own]),
        " ".join(f"`{markdown(protocol)}`" for protocol in protocols),
        markdown(first.commit or ""),
        markdown(first.date or ""),
    ]


def _last(record: RunRecord) -> list[Any]:
    """The last point of each score."""
    last = {point.name: point for point in sorted(record.scores, key=lambda point: point.step)}
    return list(last.values())


def _place(own: Sequence[RunRecord], scores: Sequence[str]) -> float:
    values = [p.value for r in own for p in _last(r) if scores and p.name == scores[0]]
    if not values:
        return float("inf")
    mean = float(np.mean(values))
    return -mean if higher_is_better(scores[0]) else mean


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else ""
    return form.format(float(np.mean(values))) + spread


def _cost(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return quantity(float(np.mean(known))) if known and len(known) == len(values) else ""


def _seedless(command: str | None) -> str | None:
    if command is None:
        return None
    words = shlex.split(command)
    return shlex.join([word for word in words if not word.startswith("seed=")])
