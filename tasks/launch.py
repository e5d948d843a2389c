"""The command line: check everything that can be checked in seconds, then hand over to Hydra."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repalign.errors import UserError, nearest, unknown_choice
from tasks import jobs
from tasks.check import check_composition, check_names, check_types

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
# Hydra's own flags that are followed by a word.
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i")
# Flags that show a configuration, complete or not, instead of running it.
FLAGS_THAT_SHOW = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version"}


def digest(text: str) -> str:
    """Sixteen hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


OmegaConf.register_new_resolver("digest", digest, replace=True)


def launch(argv: list[str]) -> int:
    """Run one command line.

    Returns:
        The exit status: 0, or 2 after one line on standard error for a mistake that the person can mend.
    """
    os.environ.setdefault("REPALIGN_ROOT", str(ROOT))
    words = [word for before, word in zip(["", *argv], argv, strict=False) if before not in FLAGS_WITH_VALUE]
    overrides = [word for word in words if word.startswith("~") or ("=" in word and not word.startswith("-"))]
    stray = [word for word in words if not word.startswith("-") and word not in overrides]
    try:
        if stray:
            raise UserError(f"'{stray[0]}': an argument has the form key=value or group=choice, or is a flag like -m")
        sweeping = bool({"-m", "--multirun"} & set(argv))
        if sweeping:
            overrides = [*named_sweep(overrides), *overrides]
        lines = combinations(overrides)
        words = for_all_jobs(overrides) if sweeping else overrides
        if not sweeping and len(lines) > 1:
            raise UserError("several values for one key make a sweep; add -m, or write a list as key=[a,b]")
        composed = [compose(combination) for combination in lines]
        if not FLAGS_THAT_SHOW & set(argv):
            for cfg in composed:
                check_composition(cfg)  # before Hydra composes twice more: a mistake is answered a second earlier
            if not sweeping and "LOCAL_RANK" not in os.environ:  # a further process of a job has the job's words
                check_single(overrides)
        flags = [word for word in argv if word not in overrides]
        _run_hydra([*flags, *words] if sweeping else argv, sweeping)
    except UserError as error:
        return _say(error)
    except HydraException as error:  # of a sweep alone: Hydra ends a single run itself
        return _say(UserError(_first_line(error)))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _say(error: UserError) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return 2


def _run_hydra(argv: list[str], sweeping: bool) -> None:
    if sweeping:
        # A failed job comes out as its own error, when the others are done: not as Hydra's summary of it.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        # Processes that run a job for us import the project from wherever they start.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.argv = [sys.argv[0], *argv]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(run_job)()


def run_job(cfg: DictConfig) -> float | None:
    """Check a composition and run its task; in a sweep, unless that job is finished.

    Returns:
        In a sweep the number named by ``score``, for a sweeper that searches.

    Raises:
        UserError: in a sweep, one line that names the job; a single run ends with it.
    """
    context = HydraConfig.get()
    sweeping = context.mode == RunMode.MULTIRUN
    if sweeping:
        cfg.run_dir = context.runtime.output_dir  # one folder per job
        # Lightning starts the further processes of a job by this line: they run the job, not the sweep.
        sys.argv = [str(ROOT / "run.py"), *context.overrides.task, f"run_dir={cfg.run_dir}"]
    cfg.overrides = list(context.overrides.task)
    try:
        check_composition(cfg)
        task: Callable[[DictConfig], None]
        if not sweeping:
            task = importlib.import_module(f"tasks.{cfg.task.name}").run
            task(cfg)
            return None
        if jobs.begin(cfg):
            print(f"job {context.job.num} is finished, not run again: {cfg.run_dir}", flush=True)
        else:
            task = importlib.import_module(f"tasks.{cfg.task.name}").run
            task(cfg)
            jobs.finish(cfg)
        return jobs.score_of(cfg)
    except UserError as error:
        if not sweeping:
            sys.exit(_say(error))
        failed = UserError(f"job {context.job.num} ({' '.join(cfg.overrides)}): {error}")
        _say(failed)  # at once; the sweep ends with it when the other jobs are done
        raise failed from error


def named_sweep(overrides: Iterable[str]) -> list[str]:
    """What ``sweep=NAME`` runs over, as words of a command line; those that are typed come later and win."""
    values = dict(word.split("=", 1) for word in overrides if "=" in word)
    file = CONF / "sweep" / f"{values.get('sweep')}.yaml"
    if not file.is_file():
        return []  # none, or a name that the composition will complain of
    params = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") or {}
    return [f"{key}={value}" for key, value in params.items() if key not in values]


def for_all_jobs(overrides: list[str]) -> list[str]:
    """A sweep's words, so that Hydra first composes what its jobs share from them.

    Where the recipe itself is swept, that part knows no recipe: a key that only recipes have becomes a sweep over its
    one value, which the jobs alone read.

    Raises:
        UserError: when such a key is to be deleted, which Hydra cannot leave to the jobs.
    """
    parsed: list[Override] = OverridesParser.create().parse_overrides(overrides)
    fixed = [o.input_line or "" for o in parsed if not o.is_sweep_override()]
    if not any(o.key_or_group == "experiment" and o.is_sweep_override() for o in parsed):
        return overrides
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        try:
            shared = hydra.compose("config", overrides=[word for word in fixed if is_group(word.split("=")[0])])
        except (HydraException, OmegaConfBaseException):
            return overrides  # the jobs will not compose either, and tell why
    known = set(flat_keys(shared))
    words = []
    for word in overrides:
        key, _, value = word.partition("=")
        if word.startswith("~") and key[1:] not in known:
            raise UserError(f"{word}: only the recipes have this key, and they are swept; set options of it instead")
        local = word in fixed and key[0] not in "+~" and not is_group(key) and key not in known
        words.append(f"{key}=choice({value})" if local and not key.startswith("hydra.") else word)
    return words


def check_single(overrides: Iterable[str]) -> None:
    """Groups that mean something to several runs alone.

    Raises:
        UserError: when one of them is chosen for a single run.
    """
    for word in overrides:
        group, _, choice = word.partition("=")
        if group in ("sweep", "launcher") and choice != "null":
            raise UserError(f"{group}: '{choice}' is for several runs; add -m (python run.py -m {group}={choice} ...)")


def combinations(overrides: Iterable[str]) -> list[list[str]]:
    """Plain command lines that together contain every choice of a sweep once (not their product).

    Raises:
        UserError: when a word cannot be parsed.
    """
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(f"command line: {_first_line(error)}") from error
    expanded = [_values_of(o) for o in parsed]
    lines = []
    for row in range(max([len(values) for values in expanded], default=1)):
        line = []
        for override, values in zip(parsed, expanded, strict=True):
            value = values[min(row, len(values) - 1)]
            line.append(override.input_line if value is None else f"{override.key_or_group}={value}")
        lines.append(line)
    return lines


def _values_of(override: Override) -> Sequence[str | None]:
    """The values that a word sweeps over, of an interval both ends; [None] for a word that does not sweep."""
    if not override.is_sweep_override():
        return [None]
    if override.is_interval_sweep():
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        return [str(interval.start), str(interval.end)]
    return list(override.sweep_string_iterator())


def compose(overrides: list[str]) -> DictConfig:
    """The composed configuration of one command line, checked.

    Raises:
        UserError: one line with the key, what was found, what was expected and the nearest valid choice.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        groups = [word for word in overrides if is_group(word.split("=")[0].lstrip("+~"))]
        check_names(groups, choices)
        try:
            cfg = hydra.compose("config", overrides=overrides)
            plain = cfg if len(groups) == len(overrides) else hydra.compose("config", overrides=groups)
        except (HydraException, OmegaConfBaseException) as error:
            raise explain(error, overrides, groups) from error
    check_types(plain, cfg, [word for word in overrides if word not in groups])
    return cfg


def is_group(name: str) -> bool:
    """Whether a word before '=' names a config group."""
    return (CONF / name.split("@")[0]).is_dir()


def choices(group: str) -> list[str]:
    """The files of a config group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def explain(error: Exception, overrides: list[str], groups: list[str]) -> UserError:
    """Hydra's composition errors as one line with the nearest valid name."""
    text = str(error)
    missing = re.search(r"[Cc]ould not (?:find|load) '([\w/]+)/([^/']*)'", text)
    if missing and missing[1].startswith("hydra/"):
        return UserError(
            f"{missing[1]}={missing[2]}: no such plugin of Hydra is installed; pip install 'repalign[sweep]'"
        )
    if missing:
        return unknown_choice(missing[1], missing[2], choices(missing[1]), f"choice of group '{missing[1]}'")
    there = re.search(r"already at '([^']+)'", text)
    if there:
        return UserError(f"{there[1]}: exists already; leave out the '+'")
    placed = re.search(r"Could not override '([^']+)'[^?]*Did you mean to override (\S+)\?", text)
    if placed:  # a group whose choice does not stand at the top
        return UserError(f"{placed[1]}: this group is chosen at its place: {placed[2]}=...")
    bad = re.search(r"Could not (?:override|append to config\.?|delete)[^']*'([^']+)'", text)
    if bad:
        key = bad[1].split("@")[0]
        return UserError(f"unknown key '{key}'.{_nearest_key(key, groups)} List all: python run.py --cfg job")
    return UserError(_first_line(error))


def _nearest_key(key: str, groups: list[str]) -> str:
    try:
        cfg = hydra.compose("config", overrides=groups)
    except (HydraException, OmegaConfBaseException):
        cfg = hydra.compose("config")
    return nearest(key, [*flat_keys(cfg), *(p.name for p in CONF.iterdir() if p.is_dir())])


def flat_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Every key of a configuration, dotted."""
    keys = []
    for name in cfg:
        full = f"{prefix}{name}"
        keys.append(full)
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            if not OmegaConf.is_interpolation(cfg, name):
                keys += flat_keys(node, full + ".")
    return keys


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
