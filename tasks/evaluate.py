"""task=evaluate: scores of pictures, from files or drawn now, with the protocol of every number."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor

from callbacks.pictures import generate
from callbacks.prompt_files import read_prompts
from callbacks.score_log import FILE, append_scores, score_lines, shown
from datamodules.own_store import Share
from datamodules.progress import progress
from repalign.errors import UserError
from repalign.folders import write_text
from repalign.metrics.features import to_uint8
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics, SeveralFeatures, spaces_of
from tasks.instantiate import build
from tasks.loggers import end, loggers_of
from tasks.pictures_in import count_pictures, fingerprint_of, holds, read_pictures
from tasks.processes import device, process_group
from tasks.record import commit_of, hardware
from tasks.sample import drawing_of, restored, settings, wanted_labels

Metrics = FeatureMetrics | SeveralFeatures


def run(cfg: DictConfig) -> None:
    """Score the pictures; write ``evaluation.json`` and append to ``metrics.jsonl`` beside it.

    Raises:
        UserError: one line for missing pictures, weights or reference.
    """
    if cfg.metric is None:
        raise UserError("metric: none chosen; set metric=lite0 or metric=inception")
    with process_group() as share:
        metrics: Metrics = build(cfg.metric, "metric")
        metrics.reset()
        for space in spaces_of(metrics).values():
            space.to(device())
        began = time.perf_counter()
        score = _score_given if cfg.task.samples is not None else _score_drawn
        target, notes = score(cfg, metrics, share)
        if share.part == 0:
            lines = score_lines(metrics, metrics.compute(), notes["settings"] or {}, notes.pop("step"))
            result = {**summary(metrics, lines), "seconds": round(time.perf_counter() - began, 1), **notes}
            _write(result, lines, target)
            if cfg.task.samples is None:
                _log(cfg, result["metrics"], lines[0]["step"] if lines else None)
            for line in without_interval(metrics, lines):
                print(line, flush=True)


def _score_given(cfg: DictConfig, metrics: Metrics, share: Share) -> tuple[Path, dict[str, Any]]:
    if share.parts > 1:
        raise UserError("task.samples: given pictures are scored by one process; start one alone")
    task, samples = cfg.task, Path(cfg.task.samples)
    total = count_pictures(samples, "task.samples")
    if any(space.reads_captions for space in spaces_of(metrics).values()):
        set_captions(metrics, captions_beside(task, samples, total))
    set_references(metrics, cfg, build(cfg.data, "data") if task.reference is None else None)
    with progress("scoring", total) as advance:
        for images in read_pictures(samples, task.batch_size, "task.samples"):
            metrics.update(images)
            advance(len(images))
    folder = samples if samples.is_dir() else samples.parent
    drawn = settings_beside(folder)
    return folder, {"samples": str(samples), "settings": drawn, "step": None}


def _score_drawn(cfg: DictConfig, metrics: Metrics, share: Share) -> tuple[Path, dict[str, Any]]:
    task = cfg.task
    assembly, generator, checkpoint = restored(cfg)
    wanted = wanted_labels(cfg, assembly)
    set_captions(metrics, None if isinstance(wanted, Tensor) else wanted)
    if share.part == 0:
        set_references(metrics, cfg, assembly.data)
    told = settings(cfg, checkpoint)
    if task.keep is None:
        if share.parts > 1:
            raise UserError("task.keep: several processes meet in the folder of drawn pictures; name one")
        with progress("scoring", len(wanted)) as advance:
            for images in generate(generator, wanted, task.seed, task.batch_size, device()):
                metrics.update(to_uint8(images, task.rounding).float() / 255)
                advance(len(images))
    else:
        drawing = drawing_of(cfg, told, wanted, generator)
        drawing.draw(share, lambda serials, pictures: metrics.update(pictures.float() / 255, serials))
    if share.parts > 1:
        for space in spaces_of(metrics).values():
            space.gather()
    step = checkpoint.stem.rpartition("_")[2] if checkpoint.suffix == ".ckpt" else ""
    notes = {"samples": "drawn for this evaluation", "settings": told, "step": int(step) if step.isdigit() else None}
    return Path(cfg.run_dir), notes


def set_captions(metrics: Metrics, captions: Sequence[str] | None) -> None:
    """Give every feature space the captions of the pictures, by serial number."""
    for space in spaces_of(metrics).values():
        space.captions = captions


def captions_beside(task: DictConfig, samples: Path, count: int) -> list[str]:
    """Captions of given pictures: ``task.prompts_file``, or the ``captions.json`` that task=sample writes.

    Raises:
        UserError: when there are none, or not one for each picture.
    """
    beside = [folder / "captions.json" for folder in (samples, samples.parent) if (folder / "captions.json").is_file()]
    if task.get("prompts_file") is None and not beside:
        raise UserError(
            f"task.prompts_file: the metric reads captions, and no captions.json lies at '{samples}'; name a file"
        )
    found = read_prompts(task.prompts_file or beside[0], "task.prompts_file")
    if len(found) != count:
        raise UserError(f"task.prompts_file: {len(found)} captions for {count} pictures in '{samples}'; one for each")
    return found


def set_references(metrics: Metrics, cfg: DictConfig, data: Any) -> None:
    """Give every feature space its real side: ``task.reference``, or the data set.

    Moments (.safetensors of this project, .npz with mu and sigma) are of one network, Inception's for ADM's files. They
    serve the feature space of their width; pictures (a folder, or arr_0 of the .npz) serve all.

    Raises:
        UserError: when the path holds neither statistics nor pictures.
    """
    path = Path(cfg.task.reference) if cfg.task.reference is not None else None
    for space in spaces_of(metrics).values():
        if not space.reads_reference:
            continue
        set_reference(space, path, data, Path(cfg.paths.cache) / "reference", cfg.task.batch_size)


def set_reference(metrics: FeatureMetrics, path: Path | None, data: Any, cache: Path, batch_size: int) -> None:
    """Give a feature space its real side.

    Args:
        metrics: to be filled.
        path: statistics (.safetensors of this project, .npz with mu and sigma), or pictures, or an .npz with both
            (ADM's reference batch: published moments, and pictures for precision and recall); None: the data set.
        data: the data module, read when ``path`` is None.
        cache: where measured statistics are kept, by a hash of the content.
        batch_size: pictures at once.

    Raises:
        UserError: when the path holds neither statistics nor pictures, or less than the scores need.
    """
    if path is None:
        data.setup("fit")
        metrics.prepare(lambda: data.reference_images(batch_size), data.fingerprint, cache)
        return
    if not path.exists():
        raise UserError(f"task.reference: nothing at '{path}'; expected .npz, .safetensors or a folder of pictures")
    moments = None
    if path.suffix == ".safetensors":
        moments = Reference.load(path)
    elif holds(path, "mu"):
        moments = replace(Reference.load(path), fingerprint=f"{path.name}-{fingerprint_of(path)}")
    needs = frozenset[str]().union(*(score.needs_reference for score in metrics.scores.values()))
    if moments is not None and (needs <= moments.holds or not holds(path, "arr_0")):
        metrics.set_reference(moments)
        return
    metrics.prepare(
        lambda: read_pictures(path, batch_size, "task.reference"),
        fingerprint_of(path),
        cache,
        moments,
    )


def evaluate(samples: Iterable[Float[Tensor, "b 3 h w"]], metrics: Metrics) -> dict[str, Any]:
    """Score pictures against the reference that ``metrics`` holds.

    Args:
        samples: batches in [0, 1]; how they are cut does not change the result.
        metrics: with its references set.

    Returns:
        See :func:`summary`.
    """
    metrics.reset()
    for images in samples:
        metrics.update(images)
    found = summary(metrics, score_lines(metrics, metrics.compute(), {}, None))
    metrics.reset()
    return found


def summary(metrics: Metrics, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """``metrics`` (name -> value), their protocols, numbers of pictures, date, commit and hardware."""
    values: dict[str, float] = {}
    for line in lines:
        values[line["name"]] = line["value"]
        values |= {f"{line['name']}_{key}": line[key] for key in ("std", "ci95") if line[key] is not None}
    first = lines[0]["record"] if lines else {}
    return {
        "metrics": values,
        "protocols": {line["protocol"]: line["record"] for line in lines},
        "protocol_of": {line["name"]: line["protocol"] for line in lines},
        "num_samples": metrics.count,
        "num_reference": first.get("num_reference"),
        "network": first.get("features"),
        "reference": first.get("reference"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "commit": commit_of(Path(__file__).parent),
        "hardware": hardware(),
    }


def _log(cfg: DictConfig, values: Mapping[str, float], step: int | None) -> None:
    """The numbers of a run's checkpoint in its loggers, as ``eval/checkpoint/<name>``; other weights have no run."""
    if step is None or not (Path(cfg.run_dir) / "config.yaml").is_file():
        return
    loggers = loggers_of(cfg)
    for logger in loggers:
        logger.log_metrics({f"eval/checkpoint/{name}": value for name, value in values.items()}, step=step)
        logger.save()
    end(loggers)


def without_interval(metrics: Metrics, lines: list[dict[str, Any]]) -> list[str]:
    """A sentence for each score that was to have an interval and has none."""
    asked = {name for space in spaces_of(metrics).values() if space.draws for name in space.scores}
    return [
        f"{line['name']}: no interval, half of {metrics.count} pictures are too few for this score"
        for line in lines
        if line["name"] in asked and line["ci95"] is None
    ]


def _write(result: dict[str, Any], lines: list[dict[str, Any]], folder: Path) -> None:
    for warning in append_scores(folder / FILE, lines):
        print(f"warning: {warning}", flush=True)
    write_evaluation(result, folder / "evaluation.json")
    for row in shown(result["metrics"]):
        name = row.split()[0]
        print(f"{row}  (protocol {result['protocol_of'][name]})", flush=True)
    print(
        f"{result['num_samples']} pictures against {result['num_reference']}; wrote {folder / 'evaluation.json'}",
        flush=True,
    )


def write_evaluation(result: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file that is whole or not there."""
    write_text(path, json.dumps(result, indent=2, default=str) + "\n")


def settings_beside(folder: Path) -> dict[str, Any] | None:
    """What task=sample wrote about how the pictures were drawn; None for pictures from elsewhere."""
    for candidate in (folder, folder.parent):
        if (candidate / "settings.json").is_file():
            return json.loads((candidate / "settings.json").read_text())
        if (candidate / "manifest.json").is_file():
            return json.loads((candidate / "manifest.json").read_text())["info"].get("settings")
    return None
