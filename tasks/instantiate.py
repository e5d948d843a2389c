"""Objects from configuration nodes, from allow-listed targets alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from repalign.errors import UserError

# A configuration file may come from anywhere; it can build parts of this project and of training, nothing else.
ALLOWED = (
    "repalign.",
    "lightning_modules.",
    "datamodules.",
    "callbacks.",
    "torch.optim.",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.strategies.",
)


def check_targets(cfg: DictConfig) -> None:
    """Refuse any ``_target_`` outside the allow-list, anywhere in a configuration; an interpolated one too.

    Raises:
        UserError: naming the key, the target and the allowed beginnings.
    """
    for key, node in objects(OmegaConf.to_container(cfg, resolve=False)):
        if not str(node["_target_"]).startswith(ALLOWED):
            raise UserError(
                f"{key}._target_: '{node['_target_']}' may not be built from a configuration; allowed: "
                + ", ".join(f"{prefix}*" for prefix in ALLOWED)
            )


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


def build(node: Any, key: str) -> Any:
    """Instantiate a node recursively.

    Args:
        node: with ``_target_``, or a mapping or list of such nodes.
        key: its place in the configuration, for messages.

    Raises:
        UserError: when the target is not allowed, or when the object refuses its arguments.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, (TypeError, ValueError)):
            raise UserError(f"{key}: {cause}") from error
        if cause is not None:
            raise cause from None
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
