"""Hydra's own part of a command line and of a configuration: what of it may be chosen.

Hydra acts on its part before any task runs: it builds launcher, sweeper, callbacks and log handlers, sets environment
variables, reads pickles (``--experimental-rerun``). A recipe of someone else may hold such a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from repalign.errors import UserError, nearest

# Flags that are followed by a word.
FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i")
# Flags that show a configuration, complete or not, instead of running it.
FLAGS_THAT_SHOW = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version"}
_FLAGS = (*FLAGS_WITH_VALUE, *sorted(FLAGS_THAT_SHOW), "--resolve", "--run", "-r", "--multirun", "-m")
_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.", "optuna.samplers.")
_HANDLERS = ("logging.StreamHandler", "logging.NullHandler")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# Options of launchers and sweepers that are commands, code or places: from the command line alone.
_TYPED = ("setup", "python", "srun_args", "additional_parameters", "custom_search_space", "storage", "submitit_folder")


def check_flags(argv: Iterable[str]) -> None:
    """Refuse flags that take another configuration tree or a pickle, and abbreviations of them.

    Raises:
        UserError: naming the flag.
    """
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("-") and flag not in _FLAGS:
            raise UserError(
                f"{flag}: no flag of run.py.{nearest(flag, _FLAGS)} Valid: {', '.join(dict.fromkeys(_FLAGS))}."
            )


def config_dir(argv: list[str]) -> Path | None:
    """The folder of ``--config-dir``: recipes and choices that lie outside the project.

    Raises:
        UserError: when it is not there.
    """
    for position, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            value = value or "".join(argv[position + 1 : position + 2])
            if not value or not Path(value).is_dir():
                raise UserError(f"{flag}: no folder '{value}'; expected one with groups as in conf/")
            folder = Path(value).resolve()
            for file in folder.rglob("*.yaml"):
                _check_plain(file)
            return folder
    return None


def _check_plain(file: Path) -> None:
    """Refuse aliases, a few lines of which stand for more than the memory holds; other faults Hydra names itself."""
    try:
        for event in yaml.parse(file.read_text(encoding="utf-8"), yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(
                    f"'{file}' line {event.start_mark.line + 1}: a recipe has no aliases (*name); write it out"
                )
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError):
        return


def check_hydra(node: DictConfig, overrides: Iterable[str]) -> None:
    """Hydra's part of a composed configuration builds plugins of Hydra alone and changes nothing of the machine.

    Args:
        node: ``hydra`` of the composition.
        overrides: what was typed: commands of launchers are taken from there alone.

    Raises:
        UserError: naming the key.
    """
    plain: Any = OmegaConf.to_container(node, resolve=False)
    typed = {word.split("=")[0].lstrip("+~") for word in overrides}
    for key in ("callbacks", "job.env_set", "searchpath", "output_subdir"):
        found = plain
        for name in key.split("."):
            found = found[name]
        if found and f"hydra.{key}" not in typed - {"hydra.callbacks"}:
            raise UserError(f"hydra.{key}: a configuration may not set it, found {found!r}; leave it out")
    for key, name, value in _leaves(plain, "hydra"):
        logs = key.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
        if name == "_target_" and not str(value).startswith(_PLUGINS):
            raise UserError(f"{key}: '{value}' may not be built; allowed: {', '.join(f'{p}*' for p in _PLUGINS)}")
        if logs and (name == "()" or (name == "class" and value not in _HANDLERS)):
            raise UserError(f"{key}: '{value}' may not handle logs; allowed: {', '.join(_HANDLERS)}")
        if isinstance(value, str) and "://" in value and logs and value not in _STREAMS:
            raise UserError(f"{key}: '{value}' is no stream; allowed: {', '.join(_STREAMS)}")
        if logs and isinstance(value, str) and "${" in value:
            raise UserError(f"{key}: '{value}': options of logs are written out")
        if key.startswith(("hydra.launcher.", "hydra.sweeper.")) and set(key.split(".")) & set(_TYPED):
            own = name == "submitit_folder" and value == "${hydra.sweep.dir}/.submitit/%j"
            if value and not own and not any(key.startswith(word) for word in typed):
                raise UserError(f"{key}: is taken from the command line alone, found {value!r} in a configuration")


def _leaves(node: Any, key: str) -> Iterator[tuple[str, str, Any]]:
    """(dotted key, last name, value) of everything that is no container."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        if isinstance(value, (dict, list)):
            yield from _leaves(value, f"{key}.{name}")
        else:
            yield f"{key}.{name}", str(name), value
