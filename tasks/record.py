"""What a run folder says about itself."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.syntax import Syntax

from repalign.folders import write_text

_PACKAGES = ("torch", "lightning", "hydra-core", "timm", "torchmetrics", "numpy")


def show_config(cfg: DictConfig) -> None:
    """Print the composed configuration in colours."""
    Console().print(Syntax(OmegaConf.to_yaml(cfg), "yaml", background_color="default", word_wrap=True))


def commit_of(folder: Path) -> str | None:
    """Commit of the checkout, with '+' when it has uncommitted changes; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None


def hardware() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


class RunStatus(pl.Callback):
    """Keeps ``run.json``: status, times, commit, hardware, versions; written atomically."""

    def __init__(
        self, run_dir: Path, started: float, resumed_from: Path | None = None, attribution: str | None = None
    ) -> None:
        self.path = run_dir / "run.json"
        self.started = started
        self.content: dict[str, Any] = {
            "status": "starting",
            "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started)),
            "resumed_from": None if resumed_from is None else str(resumed_from),
            "attribution": attribution,
            "commit": commit_of(Path(__file__).parent),
            "hardware": hardware(),
            "versions": {name: version(name) for name in _PACKAGES},
        }
        self._write()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Note the time to the first finished step."""
        if "seconds_to_first_step" not in self.content:
            self._update(status="running", seconds_to_first_step=round(time.time() - self.started, 2))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run has all its steps."""
        self._update(
            status="finished",
            step=pl_module.progress.step,
            seconds=round(time.time() - self.started, 1),
            images=len(trainer.datamodule.dataset),
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The run stopped; say where and why."""
        self._update(status=f"stopped: {type(exception).__name__}", step=pl_module.progress.step)

    def _update(self, **entries: Any) -> None:
        self.content.update(entries)
        self._write()

    @rank_zero_only
    def _write(self) -> None:
        self.content["written"] = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        write_text(self.path, json.dumps(self.content, indent=2))
