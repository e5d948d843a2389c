"""task=train: fit a composition, from the newest checkpoint of its run folder if there is one."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from callbacks.checkpoint import AtomicCheckpointIO, checkpoints_in, progress_of
from callbacks.guard import Collapsed
from callbacks.tidy_csv import TidyCSVLogger
from repalign.errors import UserError
from repalign.seals import require_whole
from tasks import jobs
from tasks.build import Assembly, assemble
from tasks.instantiate import build
from tasks.loggers import describe, end, loggers_of
from tasks.record import RunStatus, show_config
from tasks.report_data import read_run
from tasks.roll_back import roll_back, roll_backs, seed_after
from tasks.run_records import write_record_of
from tasks.start import start_from

# What a module that runs its phases by hand does itself, and Lightning refuses to be told as well.
BY_HAND = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
# Every phase leaves the parameters of the others without a gradient.
STRATEGY_BY_HAND = {"ddp": "ddp_find_unused_parameters_true"}


def run(cfg: DictConfig) -> None:
    """Compose, prepare the data, train; after a collapse that the guard may mend, once more from before it.

    Raises:
        UserError: one line for whatever the person can mend.
    """
    quiet()
    while True:
        try:
            return attempt(cfg)
        except Collapsed as collapse:
            roll_back(collapse, Path(cfg.run_dir), cfg.seed)


def attempt(cfg: DictConfig) -> None:
    """One training, from the newest checkpoint of its run folder if there is one.

    Raises:
        Collapsed: when the guard stopped it.
    """
    started = time.time()
    run_dir = Path(cfg.run_dir)
    checkpoint = find_checkpoint(cfg.resume, run_dir)
    done = 0 if checkpoint is None else _step_of(checkpoint)
    if done >= cfg.steps:
        print(f"{checkpoint} has all {cfg.steps} steps already; give more steps=... or another run_name", flush=True)
        if read_run(run_dir).record.get("status") != "finished":
            print(
                "it was stopped after them, before its last scores and pictures: the same words with task=evaluate or "
                "task=sample make them",
                flush=True,
            )
        return
    rank_zero_only(show_config)(cfg)
    assembly = assemble(cfg)
    assembly.module.seed = seed_after(roll_backs(run_dir), cfg.seed)
    _describe(cfg, run_dir)
    if checkpoint is None and cfg.init_from not in (None, "random"):
        kept = start_from(assembly.module, cfg.init_from)
        print(f"beginning with {cfg.init_from}" + (f"; not from there: {', '.join(kept)}" if kept else ""), flush=True)
    record = RunStatus(run_dir, started, checkpoint, assembly.data.attribution)

    loggers = loggers_of(cfg)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        # Lightning would save inside its signal handler, in the middle of a step; callbacks/preemption.py waits.
        plugins.append(SLURMEnvironment(auto_requeue=False))
        _check_name(cfg.overrides, run_dir)
    trainer: pl.Trainer = build(cfg.trainer, "trainer")(
        **by_hand(assembly.module, cfg),
        logger=loggers,
        callbacks=[*build(cfg.callbacks, "callbacks").values(), record],
        plugins=plugins,
    )
    prepare(assembly, trainer)
    for logger in loggers:
        if isinstance(logger, TidyCSVLogger):
            # The run writes the rows after its checkpoint again; without a checkpoint, all of them.
            logger.rewind(-1 if checkpoint is None else done)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}", flush=True)
    describe(loggers, cfg)
    torch.set_float32_matmul_precision("high")  # TF32 where the recipe's precision is float32 on a GPU (DiT, SiT, REPA)
    try:
        trainer.fit(assembly.module, datamodule=assembly.data, ckpt_path=checkpoint, weights_only=True)
    finally:
        end(loggers)
    if trainer.is_global_zero and record.content["status"] == "finished":
        write_record_of(run_dir)


def by_hand(module: pl.LightningModule, cfg: DictConfig) -> dict[str, Any]:
    """Arguments of the trainer that a module which runs its phases by hand needs otherwise; none for the others."""
    if module.automatic_optimization:
        return {}
    strategy = cfg.trainer.strategy
    return {**BY_HAND, **({"strategy": STRATEGY_BY_HAND[strategy]} if strategy in STRATEGY_BY_HAND else {})}


def trainer_for(
    cfg: DictConfig, module: pl.LightningModule, steps: int, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """The composition's trainer for so many steps that are looked at: it keeps and shows nothing by itself."""
    return build(cfg.trainer, "trainer")(
        **{**by_hand(module, cfg), "max_steps": steps, "enable_checkpointing": False, "enable_progress_bar": False},
        logger=False,
        callbacks=list(callbacks),
    )


def prepare(assembly: Assembly, trainer: pl.Trainer) -> None:
    """The data, and what of them is computed once, where the training will run."""
    assembly.data.setup("fit")
    assembly.data.attach_cache(
        autoencoder=assembly.autoencoder,
        encoders=assembly.encoders,
        text_encoders=assembly.text_encoders,
        device=trainer.strategy.root_device,
    )


@rank_zero_only
def _describe(cfg: DictConfig, run_dir: Path) -> None:
    """The composed configuration and what was typed, beside the checkpoints."""
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)
    OmegaConf.save(cfg.overrides, run_dir / "overrides.yaml")


def quiet() -> None:
    """Leave out what Lightning says of things that are meant so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*module\(s\) in eval mode at the start of training",  # the average and the frozen parts
        r".*LeafSpec.* is deprecated",  # inside Lightning
    ):
        warnings.filterwarnings("ignore", message=message)


def _check_name(overrides: Sequence[str], run_dir: Path) -> None:
    """A job of Slurm that is put back into the queue must find its folder again, and its processes the same one.

    Raises:
        UserError: when the folder would be named by the clock.
    """
    named = any(word.startswith(("run_name=", "run_dir=")) for word in overrides)
    if not named and not (run_dir / jobs.RECORD).is_file():  # a job of a sweep has a folder of its own
        raise UserError("run_name: a job of Slurm, run again, goes on in the folder of this name; give run_name=NAME")


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """Where to start: the newest checkpoint of the run folder, none, or the one that was named.

    Raises:
        UserError: when the named file is not there.
    """
    if resume == "never":
        if checkpoints_in(run_dir):
            raise UserError(f"resume: 'never', but '{run_dir}' already holds checkpoints; choose another run_name")
        return None
    if resume == "auto":
        return newest_whole(run_dir)
    path = Path(resume)
    if not path.exists():
        raise UserError(f"resume: no checkpoint '{resume}'; give 'auto', 'never' or the path of a .ckpt file")
    require_whole(path)
    return path


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is what was written; says in a line which ones are not.

    Raises:
        UserError: when there are some, and all are damaged: beginning anew is not for this to decide.
    """
    found = checkpoints_in(run_dir)
    for checkpoint in reversed(found):
        try:
            require_whole(checkpoint)
            _step_of(checkpoint)
        except UserError as error:
            print(f"{error}; trying the one before", flush=True)
        else:
            return checkpoint
    if found:
        raise UserError(
            f"resume: all {len(found)} checkpoints in '{found[0].parent}' are damaged; restore one, or remove them to "
            "begin anew"
        )
    return None


def _step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was written; a resumed run begins there.

    Raises:
        UserError: when the file is torn or foreign.
    """
    try:
        return progress_of(checkpoint)
    except Exception as error:  # the reader raises many kinds; to the person they are one
        raise UserError(f"resume: '{checkpoint}' cannot be read ({type(error).__name__}); remove it") from error
