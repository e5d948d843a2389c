"""task=doctor: what is wrong with a machine, the data or a recipe, in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig, open_dict

from callbacks.guard import Collapsed
from repalign.errors import UserError
from tasks import doctor_data, doctor_machine, fingerprints
from tasks.benchmark import other_recipe
from tasks.diagnosis import diagnose
from tasks.findings import LOOK, WRONG, Finding, show


def run(cfg: DictConfig) -> None:
    """Check machine and data; with ``task.run`` also what the first steps of the composition do.

    A check that fails does not keep the others from being made.

    Raises:
        UserError: one line at the end when something is wrong; options out of range.
    """
    task = cfg.task
    if task.verify not in ("size", "hash"):
        raise UserError(f"task.verify: expected size or hash, found '{task.verify}'")
    if not isinstance(task.steps, int) or task.steps < 2:
        raise UserError(f"task.steps: expected 2 or more, found {task.steps!r}")
    if task.write and fingerprints.TINY not in cfg.overrides:
        raise UserError(f"task.write: a fingerprint is of a recipe with {fingerprints.TINY}; add it")
    # All are composed and checked before the first minute is spent.
    composed = [other_recipe(cfg, recipe) for recipe in task.recipes] or [cfg]
    findings: list[Finding] = []
    if not task.write:
        machine = [finding for check in doctor_machine.CHECKS for finding in _made(lambda c=check: c(cfg))]
        data = [finding for check in doctor_data.checks(cfg) for finding in _made(check)]
        show("machine", machine)
        show("data", data)
        findings += [*machine, *data]
    if task.run or task.write:
        for one in composed:
            findings += training(one)
    wrong, look = (sum(f.state == state for f in findings) for state in (WRONG, LOOK))
    if wrong:
        raise UserError(f"doctor: {wrong} of {len(findings)} checks are wrong: see the lines above")
    print(f"{len(findings)} checks: nothing is wrong" + (f", {look} to look at" if look else ""), flush=True)


def training(cfg: DictConfig) -> list[Finding]:
    """Take the steps, and judge or keep what was seen."""
    with open_dict(cfg):
        cfg.steps = cfg.task.steps
    name, begun = fingerprints.recipe_of(cfg) or cfg.name, time.perf_counter()
    path = fingerprints.file_of(Path(cfg.task.fingerprints), cfg)
    try:
        seen = fingerprints.take(cfg, cfg.task.steps)
    except (UserError, Collapsed) as error:
        findings = [Finding(name, WRONG, str(error), "see the line")]
        show(f"training: {name}", findings)
        return findings
    if cfg.task.write:
        assert path is not None
        fingerprints.write(path, name, seen)
        print(f"{name}: wrote {path.name} in {time.perf_counter() - begun:.1f} s", flush=True)
        return []
    stored = fingerprints.read(path) if path is not None and path.exists() else None
    findings = diagnose(seen.facts, seen.curves, stored, cfg.task.tolerance)
    if path is not None and stored is None:
        findings.append(Finding("fingerprint", LOOK, f"there is no {path.name}", "take it with task.write=true"))
    if stored is not None and (others := fingerprints.other_versions(stored)):
        findings.append(
            Finding("versions", LOOK, ", ".join(others), "small differences of numbers may come from there")
        )
    show(f"training: {name}, {cfg.task.steps} steps in {time.perf_counter() - begun:.1f} s", findings)
    return findings


def _made(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check found; that it broke down is a finding too."""
    try:
        return list(check())
    except Exception as error:  # whatever a broken machine can raise: the other checks are made all the same
        return [Finding("a check", WRONG, f"ended with {type(error).__name__}: {error}", "see the line")]
