"""Objects from configuration nodes, from allow-listed targets alone."""

from __future__ import annotations

from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig

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


def check_targets(node: Any, key: str = "") -> None:
    """Refuse any ``_target_`` outside the allow-list, anywhere below the node.

    Raises:
        UserError: naming the key, the target and the allowed beginnings.
    """
    if isinstance(node, DictConfig):
        for name in node:
            value = node._get_node(name)
            if name == "_target_" and not str(node[name]).startswith(ALLOWED):
                raise UserError(
                    f"{key}._target_: '{node[name]}' may not be built from a configuration; allowed: "
                    + ", ".join(f"{prefix}*" for prefix in ALLOWED)
                )
            if not node._is_missing(name) and not node._is_interpolation(name):
                check_targets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node._iter_ex(resolve=False)):
            check_targets(item, f"{key}[{index}]")


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
