"""task=stages: trainings in order, each from the weights of the one before; resumable within and between them."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from callbacks.checkpoint import checkpoints_in
from repalign.errors import UserError, unknown_choice
from tasks import jobs, train
from tasks.check import check_composition
from tasks.hydra_part import config_dir
from tasks.launch import ROOT, compose

KEYS = ("experiment", "words")
OWN = ("experiment", "task", "run_name", "run_dir", "resume")  # what a stage is given, not asked for
# What Lightning leaves in the environment for the processes that it started.
_RANKS = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE")


@dataclass
class Stage:
    """One training of the list.

    Attributes:
        key: where it stands, for messages.
        cfg: its composition, ``init_from`` the folder's name of the stage before it.
        words: the command line that composes it, but for ``init_from``.
    """

    key: str
    cfg: DictConfig
    words: list[str]

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.cfg.run_dir)

    @property
    def last(self) -> Path:
        """Its checkpoint of the last step."""
        return self.folder / "checkpoints" / f"step_{self.cfg.steps:08d}.ckpt"


def run(cfg: DictConfig) -> None:
    """Train the stages of ``task.stages`` in ``run_dir/01_NAME``, ``02_NAME`` ...; finished ones are left alone.

    A stage is what ``python run.py experiment=RECIPE <its words> <what else was typed>`` trains. It begins with the
    last checkpoint of the stage before: its weights with the weights, its average with the average; fixed positions
    are its own (:func:`tasks.start.start_from`), optimizer, step count, schedules and draws begin anew. All stages are
    composed and checked before the first step of any. A folder remembers its composition (:mod:`tasks.jobs`) and is
    never continued with another one; more ``steps`` are taken as long as the next stage has not begun.

    Raises:
        UserError: in one line that names the stage.
    """
    if cfg.resume != "auto":
        raise UserError(f"resume: stages go on where they were stopped, expected 'auto', found '{cfg.resume}'")
    stages = composed(cfg)
    finished = progress(stages, Path(cfg.run_dir))
    for place, stage in enumerate(stages):
        if place < finished:
            print(f"{stage.folder.name} is finished, not run again: {stage.folder}", flush=True)
            continue
        print(f"{stage.folder.name}: {stage.folder}", flush=True)
        jobs.mark(stage.cfg, finished=False)
        try:
            with _alone():
                _train(stage, stages[place - 1] if place else None)
        except UserError as error:
            raise UserError(f"{stage.key}: {error}") from error
        if not stage.last.exists():
            raise UserError(f"{stage.key}: has left no checkpoint of step {stage.cfg.steps} in '{stage.folder}'")
        jobs.mark(stage.cfg, finished=True)
    print(f"all {len(stages)} stages are finished: {cfg.run_dir}", flush=True)


def composed(cfg: DictConfig) -> list[Stage]:
    """The stages in their order, each composed and checked.

    Raises:
        UserError: for a key or word that is none, a stage that does not compose or is no training; the line names it.
    """
    listed: Any = OmegaConf.to_container(cfg.task.stages, resolve=False)
    if not isinstance(listed, Mapping) or not listed:
        raise UserError(f"task.stages: expected NAME: {{experiment: RECIPE, words: [...]}}, found {listed!r}")
    beside = config_dir(sys.argv[1:])
    found: list[Stage] = []
    for number, (name, spec) in enumerate(listed.items(), start=1):
        key = f"task.stages.{name}"
        if not re.fullmatch(r"[A-Za-z]\w*", str(name)):
            raise UserError(f"{key}: expected a name of letters, digits and '_', which is that of a folder too")
        own = _own_words(key, spec)
        # What begins the first stage is typed; the others have the stage before, which has left nothing yet.
        typed = [word for word in cfg.overrides if _group(word) not in (OWN if not found else (*OWN, "init_from"))]
        folder = f"{number:02d}_{name}"
        what = [f"experiment={spec['experiment']}", *own, *typed]
        words = [*what, f"run_dir={quoted(Path(cfg.run_dir) / folder)}", f"run_name={folder}"]
        try:
            stage = compose([*words, "init_from=random"] if found else words, beside)
            if stage.task.name != "train":
                raise UserError(f"experiment: expected a training, found '{spec['experiment']}', a {stage.task.name}")
            check_composition(stage)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        stage.overrides = what
        if found:
            stage.init_from = found[-1].folder.name
        found.append(Stage(key, stage, words if beside is None else ["--config-dir", str(beside), *words]))
    return found


def _own_words(key: str, spec: Any) -> list[str]:
    """The words of a stage.

    Raises:
        UserError: for what is no stage.
    """
    if not isinstance(spec, Mapping):
        raise UserError(f"{key}: expected {{experiment: RECIPE, words: [...]}}, found {spec!r}")
    for name in spec:
        if name not in KEYS:
            raise unknown_choice(key, str(name), KEYS, "key")
    if not isinstance(spec.get("experiment"), str):
        raise UserError(f"{key}.experiment: expected the name of a recipe, found {spec.get('experiment')!r}")
    words = spec.get("words") or []
    if not isinstance(words, Sequence) or isinstance(words, str):
        raise UserError(f"{key}.words: expected a list like [steps=1000, data.image_size=512], found {words!r}")
    for word in words:
        if not isinstance(word, str) or not ("=" in word or word.startswith("~")):
            raise UserError(f"{key}.words: expected words like steps=1000, found {word!r}")
        if _group(word) in (*OWN, "init_from"):
            raise UserError(f"{key}.words: '{word}': a stage is given its {_group(word)}; leave it out")
    return list(words)


def _group(word: str) -> str:
    """The first name of a word's key."""
    return re.split(r"[=.@]", word.lstrip("+~"), maxsplit=1)[0]


def quoted(path: Path) -> str:
    """A path as the value of a word, whatever its characters."""
    return "'" + str(path).replace("'", "\\'") + "'"


def progress(stages: Sequence[Stage], run_dir: Path) -> int:
    """How many stages are finished; each folder belongs to its stage, and no stage has begun before its time.

    Raises:
        UserError: naming the folder or the stage, and what to do.
    """
    names = [stage.folder.name for stage in stages]
    for record in sorted(run_dir.glob(f"*/{jobs.RECORD}")):
        if record.parent.name not in names:
            raise UserError(
                f"task.stages: '{record.parent}' is no stage of this list ({', '.join(names)}); choose another "
                "run_name, or remove the folder"
            )
    done, states = 0, [_state(stage) for stage in stages]
    while done < len(stages) and states[done] == "finished":
        done += 1
    for place, state in enumerate(states[done + 1 :], start=done + 1):
        if state != "new":
            raise UserError(
                f"{stages[done].key}: is not finished, but '{stages[place].folder}' has begun with what it was; give "
                f"the stage the steps and the folder that it had, or remove '{names[place]}'"
            )
    before = stages[done - 1]
    if 0 < done < len(stages) and states[done] == "new" and not before.last.exists():
        raise UserError(
            f"{before.key}: is finished, but '{before.last}', which '{names[done]}' begins with, is gone; restore it, "
            f"or remove '{before.folder / jobs.RECORD}' to train the stage to its end again"
        )
    return done


def _state(stage: Stage) -> str:
    """Whether a stage is ``finished``, has ``begun`` or is ``new``; without a checkpoint none has begun.

    Raises:
        UserError: when its folder holds another composition, or one of more steps.
    """
    begun = bool(checkpoints_in(stage.folder))
    if not begun and not jobs.is_finished(stage.folder):
        return "new"
    try:
        record = jobs.look(stage.cfg)
    except UserError as error:
        raise UserError(f"{stage.key}: {error}") from error
    if record is not None and record.steps > stage.cfg.steps:
        raise UserError(
            f"{stage.key}: steps: expected {record.steps} or more, as many as it began with, found {stage.cfg.steps}"
        )
    return "finished" if record is not None and record.finished and record.steps == stage.cfg.steps else "begun"


def _train(stage: Stage, before: Stage | None) -> None:
    """Begin a stage, or go on with it."""
    cfg = stage.cfg.copy()
    begins = []
    if before is not None:
        cfg.init_from = str(before.last)
        cfg.overrides = [*cfg.overrides, f"init_from={before.last.relative_to(before.folder.parent)}"]
        # A stage that goes on does not read it, and it may have been removed since.
        begins = [f"init_from={quoted(before.last) if before.last.exists() else 'random'}"]
    # Lightning starts further processes of a training by this line: they run the stage, not all of them.
    sys.argv = [str(ROOT / "run.py"), *stage.words, *begins]
    train.run(cfg)


@contextmanager
def _alone() -> Iterator[None]:
    """A stage finds the process as the first one did.

    Lightning leaves ranks in the environment, and the group of the processes that it started, which end with their
    stage: the next one would wait for them. Processes that torchrun or Slurm started go through all stages together.
    """
    environment = {name: os.environ.get(name) for name in _RANKS}
    argv = sys.argv
    try:
        yield
    finally:
        sys.argv = argv
        if environment["LOCAL_RANK"] is None and torch.distributed.is_initialized() and "LOCAL_RANK" in os.environ:
            torch.distributed.destroy_process_group()
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        gc.collect()  # networks and optimizers of a stage hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
