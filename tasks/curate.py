"""task=curate: which pictures of a data set are trained on. Limits, scores and near duplicates, then a report.

Measuring is the long part. It is kept in sealed pieces, so a run that was stopped at any moment goes on with the piece
it was at, other limits measure nothing again, and the list that is written does not depend on how often it was stopped
nor on the order of the pictures. Training, precomputing and scoring read the list by ``data.keep=<task.output>``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from datamodules.curated import Decision, names_of, write_decisions
from datamodules.curation import READABLE, Measuring, judged, measured
from repalign.curation.steps import Step
from repalign.errors import UserError, unknown_choice
from repalign.folders import write_text
from tasks.curate_page import curation_page
from tasks.instantiate import build, check_targets
from tasks.report import render

REPORT = "report.html"


def run(cfg: DictConfig) -> None:
    """Measure, judge, write ``manifest.json``, ``pictures.jsonl`` and ``report.html`` into ``task.output``.

    Raises:
        UserError: one line for an unknown step, a model that is not there, a picture that cannot be read.
    """
    task, output = cfg.task, Path(cfg.task.output).expanduser()
    check_order(task)
    check_targets(cfg)
    data = build(cfg.data, "data")
    names_of(data.source)  # without names it is refused now, not when everything has been measured
    torch.manual_seed(cfg.seed)  # networks with random weights are then the same ones when it goes on
    steps = {name: build(task.steps[name], f"task.steps.{name}") for name in task.order}
    how = Measuring(task.batch_size, data.num_workers, task.piece, data.verify)
    began = time.perf_counter()
    store = measured(data.source, steps, data.cache_root, how)
    middle = time.perf_counter()
    decisions = judged(data.source, steps, store)
    removed = Counter(one.step for one in decisions)
    options: Any = OmegaConf.to_container(task.steps, resolve=True)
    told = [{"name": name, "removed": removed[name], "options": options.get(name)} for name in (READABLE, *steps)]
    write_decisions(output, decisions, {"data": data.fingerprint, "steps": told, "attribution": data.attribution})
    page = render("curate.html", curation_page(data.source, decisions, told, task.shown))
    write_text(output / REPORT, page)
    _say(steps, decisions, removed)
    print(f"measured in {middle - began:.1f} s, judged in {time.perf_counter() - middle:.1f} s", flush=True)
    print(f"wrote {output}; report: {output / REPORT}; to train on what was kept: data.keep={output}", flush=True)


def check_order(task: DictConfig) -> None:
    """Steps that ``task.order`` names are there, once each.

    Raises:
        UserError: naming the step.
    """
    for name in task.order:
        if name not in task.steps:
            raise unknown_choice("task.order", str(name), list(map(str, task.steps)), "step")
    if not task.order or len(set(task.order)) < len(task.order):
        raise UserError(f"task.order: expected different steps, at least one; found {list(task.order)}")


def _say(steps: Mapping[str, Step], decisions: list[Decision], removed: Counter[str | None]) -> None:
    left = len(decisions)
    print(f"{left} pictures", flush=True)
    for name in (READABLE, *steps):
        left -= removed[name]
        print(f"  {name}: {removed[name]} removed, {left} left", flush=True)
    if not left:
        print("nothing is left: loosen the limits of the step that removed most", flush=True)
