"""What task=plan writes: tables on the terminal and as Markdown, all numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from repalign.performance.plan import GIB, Footprint, Prediction
from tasks.tables import markdown, show

# Pictures of the data sets that papers train on; CC12M as its list has them, of which fewer can still be had.
PICTURES = {"ImageNet-1k": 1_281_167, "CC12M": 12_423_374}


def write(cfg: DictConfig, print_: Footprint, stores: dict[str, int], rows: list[tuple[str, str, Prediction]]) -> None:
    """Tables on the terminal and as Markdown, all numbers as JSON."""
    task, folder = cfg.task, Path(cfg.task.output)
    heads = [
        "GPUs",
        "strategy",
        "activations",
        "batch/GPU",
        "GiB/GPU",
        "fits",
        "ms/step",
        "images/s",
        "hours",
        "GPU-hours",
    ]
    cells = [
        [
            str(row.gpus), strategy, kept, f"{row.batch:g}", f"{row.memory:.1f}", "yes" if row.fits else "no",
            f"{1000 * row.seconds:.1f}", f"{row.images_per_second:,.0f}",
            f"{row.gpu_hours(cfg.steps) / row.gpus:,.1f}", f"{row.gpu_hours(cfg.steps):,.0f}",
        ]
        for strategy, kept, row in rows
    ]  # fmt: skip
    title = f"{cfg.name} on {task.gpu}, {task.precision}, MFU {task.mfu:g}, {cfg.steps:,} steps"
    show(title, heads, cells)
    sizes = ", ".join(
        f"{store} {each * count / 1e9:,.1f} GB ({name})"
        for store, each in stores.items()
        for name, count in PICTURES.items()
    )
    recomputed = (
        "" if print_.recomputed is None else f", {print_.recomputed / 2**20:,.1f} MiB when blocks are recomputed"
    )
    notes = [
        f"{print_.parameters / 1e6:,.1f} M trained parameters; {print_.trained_flops / 1e12:.4g} TFLOP per image, and "
        f"{print_.frozen_flops / 1e12:.4g} of frozen networks in the step.",
        f"Activations: {print_.per_image / 2**20:,.1f} MiB per image{recomputed}; "
        f"{print_.fixed / GIB:.2f} GiB per step whatever the batch; {print_.least / GIB:.2f} GiB at least.",
        f"Stores: {sizes}.",
        "Predicted, not measured: docs/scaling.md says by which model.",
    ]
    for note in notes:
        print(note, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.md").write_text("\n".join([title, "", markdown(heads, cells), "", *notes, ""]), encoding="utf-8")
    content = {
        "recipe": cfg.name,
        "footprint": asdict(print_),
        "bytes_per_picture": stores,
        "rows": [{"strategy": s, "activations": k, **asdict(row), "seconds": row.seconds} for s, k, row in rows],
    }
    (folder / "plan.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
