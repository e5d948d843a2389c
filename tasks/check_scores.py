"""Checks before heavy work of what scores read: weights of Inception, given pictures, the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repalign.errors import UserError
from repalign.metrics.inception_file import find_inception
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
    if cfg.metric is None or not (evaluates or "evaluate" in (cfg.callbacks or {})):
        return
    plain: Any = OmegaConf.to_container(cfg.metric, resolve=True)
    for key, node in objects({"metric": plain}):
        if node["_target_"] == INCEPTION:
            find_inception(node.get("weights"), f"{key}.weights")
