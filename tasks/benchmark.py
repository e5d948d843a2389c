"""task=benchmark: what a training step costs, by the step that training takes."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, open_dict

from callbacks.step_times import REGIONS, StepTimes
from repalign.errors import UserError
from repalign.performance.peaks import peak_of
from repalign.performance.spread import Spread
from tasks.build import assemble
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.record import commit_of, hardware
from tasks.tables import markdown, show
from tasks.train import by_hand, prepare, quiet

# What belongs to a step; the others write, draw and score between steps.
CALLBACKS_OF_A_STEP = ("guard", "journal")
GIB = 2**30


def run(cfg: DictConfig) -> None:
    """Measure the composition, or every recipe of ``task.recipes``; write benchmark.json and benchmark.md.

    Raises:
        UserError: one line for a count below 1, or a recipe that does not compose.
    """
    for key in ("warmup", "steps"):
        if not isinstance(cfg.task[key], int) or cfg.task[key] < 1:
            raise UserError(f"task.{key}: expected 1 or more, found {cfg.task[key]!r}")
    quiet()
    rows = []
    for recipe in list(cfg.task.recipes) or [None]:
        rows.append(measure(cfg if recipe is None else recipe_of(cfg, recipe)))
        write(rows, Path(cfg.task.output))
    print(f"wrote benchmark.json and benchmark.md to {cfg.task.output}", flush=True)


def recipe_of(cfg: DictConfig, recipe: str) -> DictConfig:
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
    times = StepTimes(cfg.task.warmup, cfg.task.steps)
    of_a_step = build({k: v for k, v in cfg.callbacks.items() if k in CALLBACKS_OF_A_STEP}, "callbacks")
    trainer: pl.Trainer = build(cfg.trainer, "trainer")(
        **{
            **by_hand(module, cfg),
            "max_steps": times.total,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
        },
        logger=False,
        callbacks=[*of_a_step.values(), times],
    )
    device = trainer.strategy.root_device
    torch.set_float32_matmul_precision("high")  # as in training
    prepare(assembly, trainer)
    stored = sorted(assembly.data.stores)
    trainer.fit(module, datamodule=assembly.data)
    if cfg.task.peak is not None:
        peak, source = float(cfg.task.peak) * 1e12, "task.peak"
    else:
        peak, source = peak_of(device, arithmetic_of(str(cfg.trainer.precision), device))
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
    del assembly, module, trainer
    gc.collect()
    return row


def arithmetic_of(precision: str, device: torch.device) -> str:
    """What the matrix products of a trainer's precision are computed in."""
    if precision.startswith("bf16"):
        return "bfloat16"
    if precision.startswith("16"):
        return "float16"
    return "tf32" if device.type == "cuda" else "float32"


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """Table on the terminal, all numbers as JSON, the table as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    regions = [name for name in REGIONS if any(name in row["split"] for row in rows)]
    heads = ["recipe", "batch", "images/s (p10-p90)", "s/step", *(f"{name} %" for name in regions)]
    heads += ["TFLOP/step", "MFU %", "peak GiB"]
    cells = [
        [
            row["recipe"],
            str(row["batch"]),
            "{median:.3g} ({p10:.3g}-{p90:.3g})".format(**row["images_per_second"]),
            f"{row['seconds']['median']:.3g}",
            *(f"{100 * row['split'].get(n, {'median': 0})['median'] / row['seconds']['median']:.1f}" for n in regions),
            f"{row['flops_per_step'] / 1e12:.4g}",
            f"{100 * row['mfu']:.1f}",
            f"{row['peak_gib']:.2f}",
        ]
        for row in rows
    ]
    show("training step: medians", heads, cells)
    first = rows[0]
    notes = [
        f"{first['hardware']}, {first['devices']} device(s), precision {first['precision']}, commit {first['commit']}; "
        f"{first['steps']} steps each.",
        f"MFU against {first['peak_flops'] / 1e12:.4g} TFLOP/s ({first['peak_source']}); operations of the whole step, "
        "frozen networks included.",
        f"Memory: {first['memory']}. Data stall: the column 'data'.",
    ]
    (folder / "benchmark.md").write_text("\n".join([markdown(heads, cells), "", *notes, ""]), encoding="utf-8")
    for note in notes:
        print(note, flush=True)
