"""Checks before heavy work of what scores read: weights of networks, prompts, given pictures, the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repalign.encoders.scorer_folders import WANTED, find_folder
from repalign.errors import UserError
from repalign.metrics.inception_file import find_inception
from repalign.prompt_sets.reading import PROMPTS, find_prompts
from tasks.instantiate import objects

INCEPTION = "repalign.metrics.inception.InceptionV3Features"


def check_scores(cfg: DictConfig) -> None:
    """The files that the scores of this task will read are there.

    Raises:
        UserError: naming the key of the first that is not.
    """
    evaluates = cfg.task.name == "evaluate"
    if evaluates:
        for key in ("samples", "reference"):
            value = cfg.task.get(key)
            if value is not None and not Path(str(value)).exists():
                raise UserError(
                    f"task.{key}: nothing at '{value}'; expected a folder of pictures or .npz"
                    + (", or .safetensors of this project" if key == "reference" else "")
                )
    if evaluates or "evaluate" in (cfg.callbacks or {}):
        check_networks(cfg, "metric")
    if cfg.task.name == "prompts":
        check_prompt_set(cfg)


def check_prompt_set(cfg: DictConfig) -> None:
    """The prompts of a benchmark are there, and the weights of its scorer where pictures are to be scored.

    Raises:
        UserError: naming the key.
    """
    if cfg.prompt_set is None:
        raise UserError("prompt_set: none chosen; set prompt_set=geneval or prompt_set=t2i_compbench")
    if cfg.prompt_set.get("_target_") in PROMPTS:
        key, expected = PROMPTS[cfg.prompt_set._target_]
        _find(cfg, key, lambda value: find_prompts(value, key, expected))
    if cfg.task.score:
        try:
            check_networks(cfg, "prompt_set")
        except UserError as error:
            raise UserError(f"{error}; task.score=false draws and writes alone") from error


def check_networks(cfg: DictConfig, part: str) -> None:
    """The weights of every network in a part of the composition are where they are looked for; none is opened.

    Raises:
        UserError: naming the key and, where the recipe reads one, the environment variable.
    """
    written: Any = OmegaConf.to_container(cfg, resolve=False)
    for place, node in objects(written[part], part):
        key, wanted = f"{place}.folder", WANTED.get(node["_target_"])
        if node["_target_"] == INCEPTION:
            find_inception(OmegaConf.select(cfg, f"{place}.weights"), f"{place}.weights")
        elif wanted is not None and "folder" in node:
            _find(cfg, key, lambda value, key=key, wanted=wanted: find_folder(value, key, wanted))


def _find(cfg: DictConfig, key: str, find: Callable[[Any], Path]) -> None:
    """Look for what an option names; a message ends with how to name it."""
    try:
        find(OmegaConf.select(cfg, key))
    except UserError as error:
        written: Any = OmegaConf.to_container(cfg, resolve=False)
        for name in key.split("."):
            written = written[name]
        variable = re.search(r"oc\.env:(\w+)", str(written))
        kind = key.rpartition(".")[2].upper()
        mend = f"{key}={kind}" + (f" or the environment variable {variable[1]}" if variable else "")
        raise UserError(f"{error}; set {mend}") from error
