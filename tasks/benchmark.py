"""task=benchmark: what a training step costs, by the step that training takes."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from callbacks.step_times import REGIONS, StepTimes
from repalign.errors import UserError, unknown_choice
from repalign.performance.peaks import peak_of
from repalign.performance.spread import Spread
from tasks.build import assemble
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.peer import BesidePeer, check_settings, told
from tasks.peer import tables as peer_tables
from tasks.peers import kind_of
from tasks.record import commit_of, hardware
from tasks.tables import markdown, show
from tasks.train import prepare, quiet, trainer_for

# What belongs to a step; the others write, draw and score between steps.
CALLBACKS_OF_A_STEP = ("guard", "journal")
GIB = 2**30
NOTHING = {"median": 0.0}
# The device's own clock, or the processor seconds of this process, which other work on the machine does not lengthen.
SECONDS = {"wall": "the device's", "cpu": "processor seconds of all threads"}
CLOCKS = {"wall": None, "cpu": time.process_time}


def run(cfg: DictConfig) -> None:
    """Measure the composition, or every recipe of ``task.recipes``; write benchmark.json and benchmark.md.

    Raises:
        UserError: one line for a count below 1, a recipe that does not compose, or an official code that does not fit.
    """
    for key in ("warmup", "steps"):
        if not isinstance(cfg.task[key], int) or cfg.task[key] < 1:
            raise UserError(f"task.{key}: expected 1 or more, found {cfg.task[key]!r}")
    if cfg.task.clock not in CLOCKS:
        raise unknown_choice("task.clock", str(cfg.task.clock), CLOCKS)
    if cfg.task.peer is not None:
        check_settings(cfg.task)
        kind_of(Path(cfg.task.peer).expanduser())
    quiet()
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)  # the journal looks at its disk
    # All are composed and checked before the first is measured.
    composed = [other_recipe(cfg, recipe) for recipe in cfg.task.recipes] or [cfg]
    rows, missing = [], []
    for one in composed:
        try:
            rows.append(measure(one))
        except (UserError, torch.OutOfMemoryError) as error:
            if len(composed) == 1:
                raise
            missing.append(f"{one.name}: {str(error).splitlines()[0]}")  # the others of a long table are still wanted
            print(f"not measured: {missing[-1]}", flush=True)
            gc.collect()
        if rows:
            write(rows, Path(cfg.task.output), missing)
    if missing:
        raise UserError(f"task.recipes: {len(missing)} of {len(composed)} not measured; {'; '.join(missing)}")
    print(f"wrote benchmark.json and benchmark.md to {cfg.task.output}", flush=True)


def other_recipe(cfg: DictConfig, recipe: str) -> DictConfig:
    """Another recipe with the same words of the command line, checked.

    Raises:
        UserError: when it does not compose.
    """
    from tasks.launch import compose

    words = [f"experiment={recipe}", *(word for word in cfg.overrides if not word.startswith("experiment="))]
    composed = compose(words)
    with open_dict(composed):
        composed.run_dir = cfg.run_dir
        composed.overrides = words
    check_composition(composed)
    return composed


def measure(cfg: DictConfig) -> dict[str, Any]:
    """One row of the table: see the keys below."""
    assembly = assemble(cfg)
    module = assembly.module
    times = StepTimes(cfg.task.warmup, cfg.task.steps, CLOCKS[cfg.task.clock])
    of_a_step = build({k: v for k, v in cfg.callbacks.items() if k in CALLBACKS_OF_A_STEP}, "callbacks")
    trainer = trainer_for(cfg, module, times.total, [*of_a_step.values(), times])
    device = trainer.strategy.root_device
    if cfg.task.clock == "cpu" and device.type != "cpu":
        raise UserError(f"task.clock: cpu, but the step runs on {device}; set task.clock=wall")
    torch.set_float32_matmul_precision("high")  # as in training
    prepare(assembly, trainer)
    stored = sorted(assembly.data.stores)
    beside, theirs = None, None
    if cfg.task.peer is not None:
        beside = BesidePeer(cfg.task, module, assembly.data, trainer)
        print(told(beside.differences), flush=True)
        theirs = beside.callback(times)
        trainer.callbacks.append(theirs)  # pyright: ignore[reportAttributeAccessIssue]  (after the clock)
    trainer.fit(module, datamodule=assembly.data)
    if cfg.task.peak is not None:
        peak, source = float(cfg.task.peak) * 1e12, "task.peak"
    else:
        peak, source = peak_of(
            device, arithmetic_of(str(cfg.trainer.precision), device), times.now or time.perf_counter
        )
    whole = Spread.of([sum(step.values()) for step in times.seconds])
    flops = sum(times.flops.values())
    assert times.memory is not None
    row = {
        "recipe": cfg.name,
        "hardware": hardware() if device.type == "cuda" else f"{hardware()}, {torch.get_num_threads()} threads",
        "commit": commit_of(Path(__file__).parent),
        "precision": str(cfg.trainer.precision),
        "devices": trainer.world_size,
        "batch": cfg.data.batch_size,
        "steps": len(times.seconds),
        "clock": cfg.task.clock,
        "stored": stored,
        "parameters": sum(p.numel() for p in module.learned()) if hasattr(module, "learned") else None,
        "seconds": whole.numbers(),
        "images_per_second": whole.inverse(cfg.data.batch_size).numbers(),
        "split": {
            name: Spread.of([step.get(name, 0.0) for step in times.seconds]).numbers()
            for name in REGIONS
            if any(name in step for step in times.seconds)
        },
        "data_stall_percent": 100 * Spread.of([s.get("data", 0.0) / sum(s.values()) for s in times.seconds]).median,
        "flops_per_step": flops,
        "flops": times.flops,
        "peak_flops": peak,
        "peak_source": source,
        "mfu": flops / whole.median / peak,
        "peak_gib": times.peak_bytes / GIB,
        "memory": times.memory.how,
    }
    if beside is not None and theirs is not None:
        row["peer"] = beside.row(times.seconds, theirs.seconds)
    del assembly, module, trainer, beside, theirs
    gc.collect()
    return row


def arithmetic_of(precision: str, device: torch.device) -> str:
    """What the matrix products of a trainer's precision are computed in."""
    if precision.startswith("bf16"):
        return "bfloat16"
    if precision.startswith("16"):
        return "float16"
    return "tf32" if device.type == "cuda" else "float32"


def write(rows: list[dict[str, Any]], folder: Path, missing: Sequence[str] = ()) -> None:
    """Tables on the terminal, all numbers as JSON, the tables as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    beside = [row for row in rows if "peer" in row]
    tables = [*own_tables(rows), *(peer_tables(beside) if beside else [])]
    for title, heads, cells in tables:
        show(title, heads, cells)
    first = rows[0]
    notes = [
        f"{first['hardware']}, {first['devices']} device(s), precision {first['precision']}, commit {first['commit']}; "
        f"{first['steps']} steps each; seconds are {SECONDS[first['clock']]}.",
        f"MFU against {first['peak_flops'] / 1e12:.4g} TFLOP/s ({first['peak_source']}); operations of the whole step, "
        "frozen networks included.",
        f"Memory: {first['memory']}. Data stall: what a step waits for its batch, the region 'data'.",
    ]
    if beside:
        notes.append("Both codes ran in one process, step after step on the same batches; memory is that of both.")
    notes += [f"Not measured: {line}." for line in missing]
    text = [f"**{title}**\n\n{markdown(heads, cells)}\n" for title, heads, cells in tables]
    (folder / "benchmark.md").write_text("\n".join([*text, *notes, ""]), encoding="utf-8")
    for note in notes:
        print(note, flush=True)


def own_tables(rows: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, heads and lines: what a step costs, and how it divides; each fits a terminal of 80 columns."""
    regions = [name for name in REGIONS if any(name in row["split"] for row in rows)]
    costs, shares = [], []
    for row in rows:
        whole = row["seconds"]["median"]
        costs.append(
            [
                row["recipe"],
                str(row["batch"]),
                "{median:.3g} ({p10:.3g}-{p90:.3g})".format(**row["images_per_second"]),
                f"{whole:.3g}",
                f"{row['flops_per_step'] / 1e12:.3g}",
                f"{100 * row['mfu']:.1f}",
                f"{row['data_stall_percent']:.1f}",
                f"{row['peak_gib']:.2f}",
            ]
        )
        shares.append(
            [row["recipe"], *(f"{100 * row['split'].get(n, NOTHING)['median'] / whole:.1f}" for n in regions)]
        )
    heads = ["recipe", "batch", "images/s (p10-p90)", "s/step", "TFLOP", "MFU %", "stall %", "GiB"]
    return [("training step: medians", heads, costs), ("where the time goes, %", ["recipe", *regions], shares)]
