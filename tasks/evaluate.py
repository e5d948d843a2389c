"""task=evaluate: scores of pictures, from files or drawn now."""

from __future__ import annotations

import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor

from callbacks.pictures import generate
from datamodules.progress import progress
from repalign.errors import UserError
from repalign.metrics.features import to_uint8
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
from tasks.instantiate import build
from tasks.pictures_in import count_pictures, fingerprint_of, read_pictures
from tasks.record import commit_of, hardware
from tasks.sample import device, restored, settings, wanted_labels


def run(cfg: DictConfig) -> None:
    """Score the pictures and write ``evaluation.json`` beside them.

    Raises:
        UserError: one line for missing pictures, weights or reference.
    """
    if cfg.metric is None:
        raise UserError("metric: none chosen; set metric=lite0 or metric=inception")
    metrics: FeatureMetrics = build(cfg.metric, "metric")
    metrics.to(device())
    task = cfg.task
    cache = Path(cfg.paths.cache) / "reference"
    if task.samples is not None:
        samples = Path(task.samples)
        data = build(cfg.data, "data") if task.reference is None else None
        pictures = read_pictures(samples, task.batch_size, "task.samples")
        total = count_pictures(samples, "task.samples")
        target = (samples if samples.is_dir() else samples.parent) / "evaluation.json"
        notes: dict[str, Any] = {"samples": str(samples), "settings": _settings_beside(target.parent)}
    else:
        assembly, generator, checkpoint = restored(cfg)
        data = assembly.data
        labels = wanted_labels(cfg, assembly)
        drawn = generate(generator, labels, task.seed, task.batch_size, device())
        pictures = (to_uint8(images, task.rounding).float() / 255 for images in drawn)
        total = len(labels)
        target = Path(cfg.run_dir) / "evaluation.json"
        notes = {"samples": "drawn for this evaluation", "settings": settings(cfg, checkpoint)}
    reference = Path(task.reference) if task.reference is not None else None
    set_reference(metrics, reference, data, cache, task.batch_size)
    result = {**evaluate(_with_progress(pictures, total), metrics), **notes}
    write_evaluation(result, target)
    for name, value in result["metrics"].items():
        print(f"{name:>16} {value:.6g}", flush=True)
    print(f"{result['num_samples']} pictures against {result['num_reference']}; wrote {target}", flush=True)


def set_reference(metrics: FeatureMetrics, path: Path | None, data: Any, cache: Path, batch_size: int) -> None:
    """Give the metrics their real side.

    Args:
        metrics: to be filled.
        path: statistics (.safetensors of this project, .npz with mu and sigma), or pictures; None: the data set.
        data: the data module, read when ``path`` is None.
        cache: where measured statistics are kept.
        batch_size: pictures at once.

    Raises:
        UserError: when the path holds neither statistics nor pictures.
    """
    if path is None:
        data.setup("fit")
        metrics.prepare(lambda: data.reference_images(batch_size), data.fingerprint, cache)
    elif path.suffix == ".safetensors" or (path.suffix == ".npz" and _holds_moments(path)):
        metrics.set_reference(Reference.load(path))
    elif path.exists():
        metrics.prepare(lambda: read_pictures(path, batch_size, "task.reference"), fingerprint_of(path), cache)
    else:
        raise UserError(f"task.reference: nothing at '{path}'; expected .npz, .safetensors or a folder of pictures")


def _holds_moments(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "mu.npy" in archive.namelist()


def evaluate(samples: Iterable[Float[Tensor, "b 3 h w"]], metrics: FeatureMetrics) -> dict[str, Any]:
    """Score pictures against the reference that ``metrics`` holds.

    Args:
        samples: batches in [0, 1]; how they are cut does not change the result.
        metrics: with its reference set.

    Returns:
        ``metrics`` (name -> value), ``num_samples``, ``num_reference``, ``network`` and ``reference`` fingerprints,
        date, commit and hardware.
    """
    metrics.reset()
    began = time.perf_counter()
    for images in samples:
        metrics.update(images)
    values, count, reference = metrics.compute(), metrics.count, metrics.reference
    metrics.reset()
    return {
        "metrics": values,
        "num_samples": count,
        "num_reference": None if reference is None else reference.count,
        "network": metrics.network.fingerprint,
        "reference": None if reference is None else reference.fingerprint,
        "seconds": round(time.perf_counter() - began, 1),
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "commit": commit_of(Path(__file__).parent),
        "hardware": hardware(),
    }


def write_evaluation(result: dict[str, Any], path: Path) -> None:
    """Write a JSON file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".incomplete")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(partial, path)


def _settings_beside(folder: Path) -> Any:
    """What task=sample wrote about how the pictures were drawn; None for pictures from elsewhere."""
    for candidate in (folder, folder.parent):
        if (candidate / "settings.json").is_file():
            return json.loads((candidate / "settings.json").read_text())
    return None


def _with_progress(batches: Iterable[Tensor], total: int) -> Iterator[Tensor]:
    with progress("scoring", total) as advance:
        for images in batches:
            yield images
            advance(len(images))
