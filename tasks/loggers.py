"""The loggers of a composition."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig

from tasks.instantiate import build


def loggers_of(cfg: DictConfig) -> list[Logger]:
    """All that group ``logger`` brings."""
    return list(build(cfg.logger, "logger").values()) if cfg.logger else []


def end(loggers: Iterable[Logger]) -> None:
    """End what would go on: the next job of a sweep in this process would write into the same W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
