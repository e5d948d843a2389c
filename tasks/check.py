"""Checks of a composed configuration that need no object: keys, types, missing values, targets."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repalign.errors import UserError, nearest
from tasks.instantiate import check_targets

# The surface of the house: a recipe that writes another top-level key has misspelt one of these.
TOP_LEVEL = frozenset(
    "task paths data autoencoder encoders backbone clock path parametrization time_sampler objective conditioner "
    "aligners optimizer scheduler sampler guidance metric method trainer callbacks logger name run_name run_dir resume "
    "seed steps compile ema reference".split()
)
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list", dict: "a mapping"}


def check_types(plain: DictConfig, cfg: DictConfig, overrides: list[str]) -> None:
    """Values given on the command line against the type of what they replace.

    Args:
        plain: composed from the group choices alone.
        cfg: composed with every override.
        overrides: the value overrides, as typed.

    Raises:
        UserError: naming the key, what was found and what was expected.
    """
    for word in overrides:
        key = word.split("=")[0].lstrip("+~")
        if word.startswith(("+", "~")):
            continue
        try:
            before, after = OmegaConf.select(plain, key), OmegaConf.select(cfg, key)
        except OmegaConfBaseException:
            continue  # an interpolation that only the run can resolve
        if before is None or after is None:
            continue
        expected, found = _kind(before), _kind(after)
        if expected != found and not (expected is float and found is int):
            raise UserError(f"{key}: expected {_WORDS[expected]} like {before!r}, found {after!r}")


def _kind(value: Any) -> type:
    if isinstance(value, ListConfig):
        return list
    if isinstance(value, DictConfig):
        return dict
    return type(value)


def check_composition(cfg: DictConfig) -> None:
    """Top-level keys, missing values, targets and the names of every object's arguments.

    Raises:
        UserError: for the first thing that is wrong.
    """
    for key in cfg:
        if key not in TOP_LEVEL:
            raise UserError(f"unknown top-level key '{key}' in the recipe.{nearest(str(key), TOP_LEVEL)}")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]}: has no value yet; set {missing[0]}=...")
    check_targets(cfg)
    for key, node in objects(cfg):
        _check_arguments(key, node)


def objects(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node with a ``_target_``, with its place; interpolated copies are visited at their own place only."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield key, node
        for name in node:
            if not node._is_interpolation(name):
                yield from objects(node._get_node(name), f"{key}.{name}" if key else str(name))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node._iter_ex(resolve=False)):
            yield from objects(item, f"{key}[{index}]")


def locate(target: str, key: str) -> Callable[..., Any]:
    """The class or function that a target names.

    Raises:
        UserError: when it does not exist; with the nearest name of its module.
    """
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{key}._target_: no module '{error.name}' for '{target}'") from error
    if not hasattr(module, name):
        raise UserError(f"{key}._target_: '{module_name}' has no '{name}'.{nearest(name, vars(module))}")
    return getattr(module, name)


def _check_arguments(key: str, node: DictConfig) -> None:
    signature = inspect.signature(locate(node._target_, key))
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values()):
        return
    for name in node:
        if str(name).startswith("_"):
            continue
        if name not in names:
            owner = str(node._target_).rpartition(".")[2]
            raise UserError(
                f"{key}.{name}: {owner} has no such option.{nearest(str(name), names)} Valid: {', '.join(names)}."
            )
