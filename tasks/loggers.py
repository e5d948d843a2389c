"""The loggers of a composition."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from tasks.instantiate import build
from tasks.report_sweep import variant_of


def loggers_of(cfg: DictConfig) -> list[Logger]:
    """All that group ``logger`` brings."""
    return list(build(cfg.logger, "logger").values()) if cfg.logger else []


def describe(loggers: Iterable[Logger], cfg: DictConfig) -> None:
    """Give W&B what runs are grouped and filtered by: the composition, and ``variant``: what was typed but the seed."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    settings["variant"] = variant_of(cfg.overrides)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(settings)


def end(loggers: Iterable[Logger]) -> None:
    """End what would go on: the next job of a sweep in this process would write into the same W&B run."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
