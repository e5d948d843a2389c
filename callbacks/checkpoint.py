"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from callbacks.sharded_checkpoint import read_rest, read_whole, remove
from callbacks.sharded_strategy import ShardedStrategy
from repalign.errors import UserError, unknown_choice
from repalign.reading import read_torch
from repalign.seals import write_sealed

ON_FAILURE = ("go_on", "stop")
_NAME = re.compile(r"step_(\d+)\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, leaves a SHA-256, then renames; reads tensors and plain values only.

    An error of the disk is kept in ``failure`` instead of raised: rank 0 alone writes, and the others wait for it.
    :class:`RunCheckpoint` asks for it when they are together again.

    Attributes:
        background: copy the state and write it by a thread while the training goes on. One write at a time: the next
            save waits for it. A failure is known at the next save, or at the end.
        failure: why the last file could not be written, or None.
    """

    def __init__(self) -> None:
        self.background = False
        self.failure: str | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")  # its thread begins with the first file
        self._pending: Future[None] | None = None
        self._copies: dict[int, Tensor] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Save so that a kill at any moment leaves the last good file in place."""
        self.wait()
        if not self.background:
            self._write(checkpoint, Path(path))
            return
        self._pending = self._writer.submit(self._write, self._copied(checkpoint), Path(path))

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def teardown(self) -> None:
        """The last file is whole before the process ends."""
        self.wait()

    def _copied(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A copy made here and now, because the training moves these tensors in place.

        Its memory is kept for the next one: to be given new memory takes several times as long as the copying.
        """
        leaves, tree = tree_flatten(checkpoint)
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            copy = self._copies.get(place)
            if copy is None or (copy.shape, copy.dtype) != (leaf.shape, leaf.dtype):
                copy = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
            leaves[place] = self._copies[place] = copy.copy_(leaf.detach())
        return tree_unflatten(leaves, tree)

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            write_sealed(path, lambda file: torch.save(checkpoint, file))
        except OSError as error:
            self.failure = f"'{path}' could not be written ({error.strerror or type(error).__name__})"

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load without running any code from the file; of a folder of shards the whole."""
        if Path(path).is_dir():
            return read_whole(Path(path))
        return read_torch(path, map_location=map_location)


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
    return read_torch(checkpoint)


def progress_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written, from its content."""
    if checkpoint.is_dir():
        return int(read_rest(checkpoint)["progress"]["step"])
    return int(read_torch(checkpoint, mmap=True)["progress"]["step"])


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
        keep: how many of the newest stay; -1 keeps all. With 2, one damaged file costs no more than ``every`` steps.
        on_failure: what follows when a file cannot be written (disk full, read-only): ``go_on`` says so in a line and
            tries again at the next step that is due, ``stop`` ends the run. After the last step both end it.
        background: write while the training goes on, from a copy of the state in the memory of the host.

    Raises:
        UserError: when ``keep`` would remove the checkpoint that was just written, or a file could not be written.
    """

    def __init__(self, every: int = 1000, keep: int = 2, on_failure: str = "go_on", background: bool = False) -> None:
        super().__init__()
        if on_failure not in ON_FAILURE:
            raise unknown_choice("callbacks.checkpoint.on_failure", on_failure, ON_FAILURE)
        if keep < 1 and keep != -1:
            raise UserError(f"callbacks.checkpoint.keep: expected 1 or more, or -1 for all, found {keep}")
        self.every = every
        self.keep = keep
        self.on_failure = on_failure
        self.background = background
        self._saved = -1
        self._unwritten = False  # the last attempt failed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the writer how."""
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AtomicCheckpointIO):
            io.background = self.background

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
        """Have a whole checkpoint of the step that was just finished, before the process leaves.

        Raises:
            UserError: when it cannot be written.
        """
        if self._saved != pl_module.progress.step or self._unwritten:
            self._save(trainer, pl_module, last=True)
        elif isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.finish_writing()
        else:
            self._judge(trainer, last=True)  # what is still being written in the background

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is written in the background is whole before the run says that it has ended."""
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.finish_writing()
            self._prune(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, last: bool = False) -> None:
        """Write a checkpoint; the ``last`` one is waited for, and must succeed."""
        self._saved = pl_module.progress.step
        trainer.save_checkpoint(pl_module.run_dir / "checkpoints" / f"step_{self._saved:08d}.ckpt")
        if last and isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.finish_writing()
        if self._judge(trainer, last or self._saved == trainer.max_steps):
            self._prune(trainer, pl_module)

    def _judge(self, trainer: pl.Trainer, last: bool) -> bool:
        """Whether rank 0 could write, known to all ranks; acts by the policy when it could not."""
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, AtomicCheckpointIO):
            return True
        if last:
            io.wait()
        failure, io.failure = io.failure, None
        failure = trainer.strategy.broadcast(failure)
        self._unwritten = failure is not None
        if failure is not None and (last or self.on_failure == "stop"):
            raise UserError(
                f"checkpoint: {failure}; the one before is untouched: make room or mend the folder, then the same "
                "command goes on from it"
            )
        if failure is not None and trainer.is_global_zero:
            print(f"checkpoint: {failure}; the one before is untouched, the training goes on", flush=True)
        return failure is None

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and self.keep > 0:
            for old in checkpoints_in(pl_module.run_dir)[: -self.keep]:
                remove(old)
