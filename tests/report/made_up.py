"""Run folders as a training would leave them, with made-up numbers."""

import csv
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ATTRIBUTION = "Pictures: OpenMoji, CC BY-SA 4.0 <openmoji.org>"


def make_run(folder: Path, seed: int = 0, steps: int = 200, gain: float = 1.0, words=("experiment=demo",), **parts):
    """Write a run folder; ``parts`` set to False are left out."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    wanted = {"config": True, "overrides": True, "metrics": True, "samples": True, "record": True, **parts}
    if wanted["config"]:
        config = {
            "name": "demo",
            "run_name": folder.name,
            "steps": steps,
            "method": {"_target_": "lightning_modules.repa.REPA"},
            "data": {"_target_": "datamodules.openmoji.OpenMoji", "image_size": 64},
            "paths": {"cache": str(folder.parent / "cache")},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if wanted["overrides"]:
        (folder / "overrides.yaml").write_text(yaml.safe_dump([*words, f"seed={seed}"]))
    if wanted["metrics"]:
        write_metrics(folder / "metrics.csv", rng, steps, gain)
    if wanted["samples"]:
        write_grids(folder / "samples", rng, steps)
    if wanted["record"]:
        record = {
            "status": "finished",
            "started": "2026-11-21 05:00:00",
            "commit": "0123456789ab+",
            "hardware": "CPU, 2 cores, x86_64",
            "versions": {"torch": "2.15.0", "lightning": "2.6.6"},
            "step": steps,
            "seconds": 245.3,
            "seconds_to_first_step": 3.2,
        }
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def cost_at(step: int) -> dict[str, float]:
    return {"seconds": 1.5 * step, "device_hours": 2.5 * step / 3600, "flops": 3e9 * step}


def write_metrics(path: Path, rng: np.random.Generator, steps: int, gain: float) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "name", "value"])
        for step in range(10, steps + 1, 10):
            denoising = 0.6 + 1.2 * np.exp(-step / 60) + 0.05 * rng.standard_normal()
            alignment = -0.7 + 0.6 * np.exp(-step / 80) + 0.01 * rng.standard_normal()
            row = {
                "train/loss": denoising + 0.5 * alignment,
                "train/denoising": denoising,
                "train/align/repa": alignment,
                "train/grad_norm": 0.4 + 3 * np.exp(-step / 40) + 0.1 * rng.random(),
                "train/lr": 1e-3 * min(1, step / 100),
                "throughput/images_per_second": 150 + 20 * rng.random(),
                **{f"throughput/{name}": value for name, value in cost_at(step).items()},
            }
            writer.writerows([step, name, repr(float(value))] for name, value in row.items())
        for step in np.linspace(0, steps, 5).astype(int).tolist():
            distance = 60 + 240 * np.exp(-3 * gain * step / steps) + 5 * rng.standard_normal()
            scores = {
                "fd_lite0": distance,
                "kid_lite0": distance / 900,
                "kid_lite0_std": 0.01,
                "is_lite0": 900 / distance,
                **{f"cost/{name}": value for name, value in cost_at(step).items()},
            }
            writer.writerows([step, f"eval/{name}", repr(float(value))] for name, value in scores.items())


def write_grids(
    folder: Path, rng: np.random.Generator, steps: int, side: int = 24, rows: int = 4, columns: int = 6
) -> None:
    folder.mkdir()
    hues = rng.random((rows, columns, 1, 1, 3))
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    disc = ((x**2 + y**2) < 0.6)[None, None, :, :, None]
    clean = np.where(disc, hues, 1.0)
    noise = rng.random((rows, columns, side, side, 3))
    for step in np.linspace(0, steps, 5).astype(int).tolist():
        for kind, lag in (("raw", 1.0), ("ema", 0.8)):
            share = np.exp(-4 * lag * step / steps)
            cells = share * noise + (1 - share) * clean
            grid = cells.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 3)
            Image.fromarray((grid * 255).astype(np.uint8)).save(folder / f"step_{step:06d}_{kind}.png")


def make_manifest(cache: Path) -> None:
    store = cache / "openmoji-64px-ab12" / "pictures"
    store.mkdir(parents=True)
    (store / "manifest.json").write_text(json.dumps({"rows": 3, "info": {"attribution": ATTRIBUTION}}))
