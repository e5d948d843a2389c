"""Fingerprints: the curves and facts of a recipe's first steps with ``debug=tiny``, kept with the project."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from callbacks.training_facts import TrainingFacts
from repalign.errors import UserError
from repalign.folders import write_text
from tasks.build import assemble
from tasks.instantiate import build
from tasks.train import prepare, quiet, trainer_for

TINY = "debug=tiny"
DIGITS = 7  # that are kept: as many as a float32 has
_PACKAGES = ("torch", "lightning", "numpy", "timm")


def take(cfg: DictConfig, steps: int) -> TrainingFacts:
    """Train a composition for so many steps, without checkpoints or pictures, and note what it does.

    Raises:
        UserError: one line for a part that cannot be built.
    """
    quiet()
    assembly = assemble(cfg)
    facts = TrainingFacts()
    guard = build({k: v for k, v in cfg.callbacks.items() if k == "guard"}, "callbacks")
    trainer = trainer_for(cfg, assembly.module, steps, [*guard.values(), facts])
    prepare(assembly, trainer)
    torch.set_float32_matmul_precision("highest" if TINY in cfg.overrides else "high")  # TF32 would be other digits
    trainer.fit(assembly.module, datamodule=assembly.data)
    return facts


def file_of(folder: Path, cfg: DictConfig) -> Path | None:
    """Where a composition's fingerprint is; None for one that has none: a recipe with ``debug=tiny`` does."""
    recipe = recipe_of(cfg)
    return folder / f"{recipe}.json" if recipe and TINY in cfg.overrides else None


def recipe_of(cfg: DictConfig) -> str | None:
    """The name after ``experiment=``."""
    chosen = [word.removeprefix("experiment=") for word in cfg.overrides if word.startswith("experiment=")]
    return chosen[-1] if chosen else None


def write(path: Path, recipe: str, seen: TrainingFacts) -> None:
    """Keep a fingerprint, a number in ``DIGITS`` digits."""
    content = {
        "recipe": recipe,
        "words": [f"experiment={recipe}", TINY],
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in _PACKAGES},
        "facts": {name: _rounded(value) for name, value in sorted(seen.facts.items())},
        "curves": {name: [_rounded(v) for v in values] for name, values in sorted(seen.curves.items())},
    }
    text = json.dumps(content, indent=1)
    for values in content["curves"].values():  # a curve is one line: a file of a line per number cannot be read
        text = text.replace(json.dumps(values, indent=1).replace("\n", "\n  "), json.dumps(values))
    write_text(path, text + "\n")


def read(path: Path) -> dict[str, Any]:
    """A fingerprint.

    Raises:
        UserError: when the file is no fingerprint.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        curves = {str(k): [float(v) for v in values] for k, values in content["curves"].items()}
        facts = {str(k): float(v) for k, v in content["facts"].items()}
        steps = {len(values) for values in curves.values()}
        if len(steps) != 1:
            raise ValueError(f"curves of {sorted(steps)} steps")
        versions = {str(k): str(v) for k, v in content["versions"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"task.fingerprints: '{path}' is no fingerprint ({error}); take it again with task.write=true"
        ) from error
    return {"curves": curves, "facts": facts, "versions": versions, "steps": steps.pop()}


def other_versions(stored: dict[str, Any]) -> list[str]:
    """Packages that are here in another version than where the fingerprint was taken."""
    return [
        f"{name} {version(name)} (there {there})"
        for name, there in stored["versions"].items()
        if version(name) != there
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value
