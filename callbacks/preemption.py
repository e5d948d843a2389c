"""Saving and leaving when a signal says that the time is over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.checkpoint import RunCheckpoint
from repalign.errors import UserError, unknown_choice

SUBMITIT = "SUBMITIT_EXECUTOR"  # in the environment of the jobs of launcher=slurm


class Preemption(pl.Callback):
    """On SIGTERM, SIGUSR1 or SIGUSR2: finish the step, write a checkpoint, ask Slurm for another turn, leave.

    The signal itself only leaves a note, so no step is torn; several processes agree at every ``every``-th step whether
    any of them has one, and leave together. The exit status is 128 + the signal's number, as a shell's.

    ``sbatch --signal=USR1@120`` sends SIGUSR1 two minutes before the time limit; the job is then put back into the
    queue under its own number, and goes on from the checkpoint. SIGTERM comes when somebody cancels the job, which is
    not to bring it back, or before Slurm preempts it, which puts it back by itself. Jobs of ``launcher=slurm`` get
    submitit's signal; submitit submits them again once the checkpoint is written.

    Args:
        signals: that are heeded.
        requeue: those after which a job of Slurm goes back into the queue.
        every: steps between two looks of several processes, which cost a reduction over them each.

    Raises:
        UserError: for an unknown signal, or ``every`` below 1.
    """

    def __init__(
        self,
        signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGUSR2"),
        requeue: Sequence[str] = ("SIGUSR1",),
        every: int = 10,
    ) -> None:
        valid = [found.name for found in signal.Signals if found not in (signal.SIGKILL, signal.SIGSTOP)]
        for key, names in {"signals": signals, "requeue": requeue}.items():
            for name in names:
                if name not in valid:
                    raise unknown_choice(f"callbacks.preemption.{key}", name, valid)
        if every < 1:
            raise UserError(f"callbacks.preemption.every: expected 1 or more, found {every}")
        self.signals = [signal.Signals[name] for name in signals]
        self.requeue = [signal.Signals[name] for name in requeue]
        self.every = every
        self._asked = 0
        self._before: dict[int, Any] = {}
        self._seen = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen from now on."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python hands signals to the main thread alone
        heeded = self.signals
        if SUBMITIT in os.environ:
            # submitit lets SIGTERM pass and has one signal of its own.
            heeded = [signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]]
        self._before = {number: signal.signal(number, self._note) for number in heeded}

    def _note(self, number: int, frame: Any) -> None:
        self._asked = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave when any process was asked to.

        Raises:
            SystemExit: after the checkpoint.
        """
        step = pl_module.progress.step
        if step == self._seen:
            return  # a micro-batch inside a step
        self._seen = step
        asked = self._asked
        if trainer.world_size > 1:
            if step % self.every:
                return
            own = torch.tensor([asked], device=pl_module.device)
            every_rank = pl_module.all_gather(own)
            assert isinstance(every_rank, torch.Tensor)
            asked = int(every_rank.max())
        if asked:
            self._leave(trainer, pl_module, signal.Signals(asked))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Signals do again what they did before."""
        self._hush()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self._hush()

    def _hush(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule, asked: signal.Signals) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.save_now(trainer, pl_module)
        before = self._before.get(asked)
        step = pl_module.progress.step
        if trainer.is_global_zero:
            print(f"{asked.name}: checkpoint of step {step} is written; the same command goes on from it", flush=True)
        if SUBMITIT in os.environ and callable(before):
            before(asked, None)  # submits the job again and exits
        if asked in self.requeue and trainer.is_global_zero:
            _requeue()
        raise SystemExit(128 + asked)


def _requeue() -> None:
    """Put this job of Slurm back into the queue, under the same number; elsewhere nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise UserError(f"SLURM_JOB_ID: '{job}' is no number of a job")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    failed = f"not put back into the queue ({done.stderr.strip()}); submit it again"
    print(f"job {job}: {failed if done.returncode else 'put back into the queue'}", flush=True)
