"""Objects from configuration nodes, from allow-listed targets alone."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repalign.errors import UserError, nearest
from tasks.signatures import origin_of

CONF = Path(__file__).resolve().parent.parent / "conf"
# A configuration file may come from anywhere; it can build parts of this project and of training, nothing else.
OWN = ("repalign.", "lightning_modules.", "datamodules.", "callbacks.")
ALLOWED = (
    *OWN,
    "torch.optim.",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.strategies.",
)
# Where the source of what stands under these names lies.
ORIGINS = (*OWN, "torch.optim.", "lightning.pytorch.")


def check_targets(cfg: DictConfig) -> None:
    """Refuse any ``_target_`` outside the allow-list, anywhere in a configuration; an interpolated one too.

    Nothing is imported. What only appears when interpolations are resolved is checked by :func:`build`.

    Raises:
        UserError: naming the key, the target and the allowed beginnings.
    """
    for key, node in objects(OmegaConf.to_container(cfg, resolve=False)):
        check_target(node["_target_"], f"{key}._target_")


def check_target(target: Any, key: str) -> None:
    """Refuse what a configuration may not build: judged by its name and by the module whose source defines it.

    A name below ``repalign.`` alone would let through whatever a module of the project has imported
    (``callbacks.checkpoint.os.system``). A class may be built; a function only where a file of ``conf/`` names it: some
    of them import modules by name or write files.

    Raises:
        UserError: naming the key, the target and what is allowed.
    """
    name = str(target)
    refused = UserError(
        f"{key}: '{name}' may not be built from a configuration; allowed: classes of "
        + ", ".join(f"{prefix}*" for prefix in ALLOWED)
        + ", and functions that conf/ names"
    )
    if not name.startswith(ALLOWED) or any(part.startswith("_") for part in name.split(".")):
        raise refused
    origin, is_class = origin_of(name, key)
    if not f"{origin}.".startswith(ORIGINS) or not (is_class or name in functions_of_conf()):
        raise refused


@cache
def functions_of_conf() -> frozenset[str]:
    """Every target that a file of ``conf/`` names."""
    texts = (file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    return frozenset(name for text in texts for name in re.findall(r"_target_: *([\w.]*\w)", text))


def objects(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a ``_target_`` in plain containers, with its place."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, value in node.items():
            yield from objects(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from objects(item, f"{key}[{index}]")


def texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain containers, with its place."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from texts(value, f"{key}[{index}]")


def build(node: Any, key: str) -> Any:
    """Instantiate a node recursively, after the targets of its resolved form were checked.

    Args:
        node: with ``_target_``, or a mapping or list of such nodes.
        key: its place in the configuration, for messages.

    Raises:
        UserError: when a target is not allowed, or when the object refuses its arguments.
    """
    try:
        plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    except OmegaConfBaseException as error:
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    if plain is None:
        return None
    for place, text in texts(plain, key):
        if "${" in text:  # an escaped interpolation: Hydra would resolve it, after the check
            raise UserError(f"{place}: '{text}' is still an interpolation when it is resolved; write the value")
    for place, item in objects(plain, key):
        check_target(item["_target_"], f"{place}._target_")
        _require_genuine(item["_target_"], f"{place}._target_")
    try:
        return hydra.utils.instantiate(plain, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, (TypeError, ValueError)):
            raise UserError(f"{key}: {cause}") from error
        if cause is not None:
            raise cause from None
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error


def _require_genuine(target: str, key: str) -> None:
    """The object itself, not its name, belongs to an allowed module."""
    module, _, name = target.rpartition(".")
    held = importlib.import_module(module)
    found = getattr(held, name, None)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise UserError(f"{key}: '{module}' has no class or function '{name}'.{nearest(name, vars(held))}")
    if not f"{found.__module__}.".startswith(ORIGINS):
        raise UserError(f"{key}: '{target}' is {found.__module__}.{name}, which a configuration may not build")
