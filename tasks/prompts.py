"""task=prompts: pictures of a benchmark's prompts, in the layout of its official scorer, and scores of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from callbacks.pictures import grid_of, save_png
from callbacks.score_log import FILE, append_scores
from datamodules.progress import progress
from repalign.errors import UserError
from repalign.folders import write_text
from repalign.metrics.protocol import hash_of, record_of
from repalign.prompt_sets.interfaces import Layout, PromptSet
from repalign.prompt_sets.summary import Judged, TagScore, by_tag, overall
from repalign.training.generate import asked_by
from tasks.drawing import Drawing
from tasks.evaluate import write_evaluation
from tasks.instantiate import build
from tasks.processes import device, process_group
from tasks.record import commit_of, hardware
from tasks.sample import drawing_of, restored, settings


def run(cfg: DictConfig) -> None:
    """Draw ``per_prompt`` pictures of every prompt, write them, and score them if ``task.score``.

    Shards of drawn pictures lie below ``task.keep``: a run that is killed goes on where it was, and several processes
    (torchrun) share the drawing; one of them writes and scores.

    Raises:
        UserError: one line for prompts or weights that cannot be read, before anything is drawn; that they are not
            there is said earlier (:func:`tasks.check_scores.check_prompt_set`).
    """
    if cfg.task.keep is None:
        raise UserError("task.keep: the pictures are written and scored from the folder of drawn ones; name one")
    with process_group() as share:
        prompts = prompt_set_of(cfg, score=cfg.task.score and share.part == 0)
        assembly, generator, checkpoint = restored(cfg)
        if asked_by(assembly.module.conditioner) != "caption":
            raise UserError(f"conditioner: {cfg.name} draws by class and reads no prompts; take a text-to-image recipe")
        told = {**settings(cfg, checkpoint), "labels": prompts.fingerprint, "per_prompt": prompts.per_prompt}
        wanted = [prompt for prompt in prompts.prompts for _ in range(prompts.per_prompt)]
        drawing = drawing_of(cfg, told, wanted, generator)
        drawing.draw(share)
        if share.parts > 1:
            dist.barrier()
        if share.part == 0:
            output = Path(cfg.task.output)
            write_pictures(prompts, drawing, output)
            write_evaluation(told, output / "settings.json")
            print(f"wrote {len(wanted)} pictures of {len(prompts.prompts)} prompts to {output}", flush=True)
            if cfg.task.score:
                result = score(prompts.to(device()), drawing, told, output, step_of(checkpoint))
                for warning in append_scores(output / FILE, result):
                    print(f"warning: {warning}", flush=True)


def prompt_set_of(cfg: DictConfig, score: bool) -> PromptSet:
    """The chosen prompts; without their scorer's networks where nothing is to be scored.

    Raises:
        UserError: for missing files, before the first network is read, or weights.
    """
    node: Any = OmegaConf.to_container(cfg.prompt_set, resolve=True)
    alone = build(OmegaConf.create({**node, "scorer": None}), "prompt_set")
    return build(OmegaConf.create(node), "prompt_set") if score else alone


def write_pictures(prompts: PromptSet, drawing: Drawing, output: Path) -> None:
    """Every picture where the official scorer looks for it; every file is whole or not there."""
    with progress("writing", len(prompts.prompts)) as advance:
        for place in range(len(prompts.prompts)):
            write_prompt(prompts.layout(place), pictures_at(prompts, drawing, place), output)
            advance(1)


def write_prompt(layout: Layout, pictures: UInt8[Tensor, "n 3 h w"], output: Path) -> None:
    """The pictures of one prompt."""
    for name, picture in zip(layout.pictures, pictures, strict=True):
        save_png(picture, output / name)
    for name, text in layout.texts.items():
        write_text(output / name, text + "\n")
    if layout.grid is not None:
        save_png(grid_of(pictures.float() / 255, len(pictures)), output / layout.grid)


def pictures_at(prompts: PromptSet, drawing: Drawing, place: int) -> UInt8[Tensor, "n 3 h w"]:
    """The pictures of one prompt, from the shards."""
    first = place * prompts.per_prompt
    rows = torch.arange(first, first + prompts.per_prompt).numpy()
    return torch.from_numpy(drawing.store.gather("image", rows)).permute(0, 3, 1, 2)


def score(
    prompts: PromptSet, drawing: Drawing, told: Mapping[str, Any], output: Path, step: int | None
) -> list[dict[str, Any]]:
    """Judge every picture; write ``results.jsonl`` (a line for each) and ``scores.json``.

    Returns:
        Lines for ``metrics.jsonl``: a number for each tag, and the headline where the benchmark has one.
    """
    judged: list[Judged] = []
    lines: list[dict[str, Any]] = []
    with progress("scoring", len(prompts.prompts)) as advance:
        for place, prompt in enumerate(prompts.prompts):
            found = prompts.judge(place, pictures_at(prompts, drawing, place))
            judged += found
            for name, one in zip(prompts.layout(place).pictures, found, strict=False):
                lines.append({"filename": name, "tag": one.tag, "prompt": prompt, "value": one.value, **one.notes})
            advance(1)
    write_text(output / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    tags = by_tag(judged)
    scores = {f"{prompts.name}/{tag}": found for tag, found in tags.items()}
    if prompts.headline is not None:
        scores[prompts.headline] = overall(tags)
    known = {"features": prompts.scored_by(), "reference": prompts.fingerprint, "num_samples": len(judged)}
    record = record_of(known, told)
    result = {
        "scores": {name: asdict(found) for name, found in scores.items()},
        "not_scored": len(prompts.prompts) * prompts.per_prompt - len(judged),
        "protocol": hash_of(record),
        "record": record,
        "settings": dict(told),
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "commit": commit_of(Path(__file__).parent),
        "hardware": hardware(),
    }
    write_evaluation(result, output / "scores.json")
    for name, found in scores.items():
        print(_shown(name, found), flush=True)
    print(f"{len(judged)} pictures (protocol {result['protocol']}); wrote {output / 'scores.json'}", flush=True)
    return [
        {
            "date": result["date"],
            "step": step,
            "name": name,
            "value": found.value,
            "std": None,
            "ci95": found.ci95,
            "protocol": result["protocol"],
            "record": record,
        }
        for name, found in scores.items()
    ]


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint's name says."""
    digits = checkpoint.stem.rpartition("_")[2] if checkpoint.suffix == ".ckpt" else ""
    return int(digits) if digits.isdigit() else None


def _shown(name: str, found: TagScore) -> str:
    interval = "" if found.ci95 is None else f" ± {found.ci95:.2g}"
    return f"{name} {found.value:.4f}{interval}  ({found.pictures} pictures of {found.prompts} prompts)"
