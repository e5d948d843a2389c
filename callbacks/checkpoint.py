"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from callbacks.sharded_checkpoint import read_rest, read_whole, remove
from callbacks.sharded_strategy import ShardedStrategy
from repalign.errors import UserError

_NAME = re.compile(r"step_(\d+)\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, then renames; reads tensors and plain values only (weights_only)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Save so that a kill at any moment leaves the last good file in place."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.incomplete")
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load without running any code from the file; of a folder of shards the whole."""
        if Path(path).is_dir():
            return read_whole(Path(path))
        return torch.load(path, map_location=map_location, weights_only=True)


def checkpoints_in(run_dir: Path) -> list[Path]:
    """Complete training checkpoints of a run, oldest first."""
    return sorted((p for p in (run_dir / "checkpoints").glob("step_*.ckpt") if _NAME.search(p.name)), key=step_of)


def read_checkpoint(checkpoint: Path, optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint, a file or a folder of shards, as an ordinary one; no code from it is run.

    Args:
        checkpoint: of any number of processes.
        optimizers: whether the moments of the optimizers are read from shards.
    """
    if checkpoint.is_dir():
        return read_whole(checkpoint, optimizers)
    return torch.load(checkpoint, map_location="cpu", weights_only=True)


def progress_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written, from its content."""
    if checkpoint.is_dir():
        return read_rest(checkpoint)["progress"]["step"]
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["progress"]["step"]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    found = _NAME.search(checkpoint.name)
    assert found is not None, f"'{checkpoint}' is not named step_<number>.ckpt"
    return int(found[1])


class RunCheckpoint(Checkpoint):
    """Saves ``checkpoints/step_00001000.ckpt`` every so many finished steps and at the end; keeps the newest few.

    Goes by the run's own step counter: Lightning's ``ModelCheckpoint`` counts the steps of every optimizer. "The last
    one" is the file with the highest number, so there is no link that could point to a file not yet written.

    Args:
        every: steps between checkpoints.
        keep: how many of the newest stay; -1 keeps all.

    Raises:
        UserError: when ``keep`` would remove the checkpoint that was just written.
    """

    def __init__(self, every: int = 1000, keep: int = 2) -> None:
        super().__init__()
        if keep < 1 and keep != -1:
            raise UserError(f"callbacks.checkpoint.keep: expected 1 or more, or -1 for all, found {keep}")
        self.every = every
        self.keep = keep
        self._saved = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What was just loaded need not be saved."""
        self._saved = pl_module.progress.step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the step is due."""
        step = pl_module.progress.step
        if step != self._saved and (step % self.every == 0 or step == trainer.max_steps):
            self._save(trainer, pl_module)

    def save_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have a whole checkpoint of the step that was just finished."""
        if self._saved != pl_module.progress.step:
            self._save(trainer, pl_module)
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.finish_writing()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is written in the background is whole before the run says that it has ended."""
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.finish_writing()
            self._prune(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = pl_module.progress.step
        trainer.save_checkpoint(pl_module.run_dir / "checkpoints" / f"step_{self._saved:08d}.ckpt")
        self._prune(trainer, pl_module)

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self.keep > 0:
            for old in checkpoints_in(pl_module.run_dir)[: -self.keep]:
                remove(old)
