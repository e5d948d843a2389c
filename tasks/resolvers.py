"""What a configuration may ask of the machine while it is composed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from repalign.errors import UserError

# Others hold passwords and tokens, and a composed configuration is saved, shown in reports and sent to loggers.
VARIABLES = ("REPALIGN_", "SLURM_")


def digest(text: str | None) -> str:
    """Sixteen hexadecimal digits that stand for a text; of nothing where a composition is told without its places."""
    return hashlib.sha256((text or "").encode()).hexdigest()[:16]


def place(folder: str | None, root: str) -> str:
    """A run folder below the folder of all runs: ``demo/sweep/3``; elsewhere its last two names; '' of none."""
    if folder is None:
        return ""
    inside, runs = Path(folder).absolute(), Path(root).absolute()
    parts = inside.relative_to(runs).parts if inside.is_relative_to(runs) else inside.parts[-2:]
    return "/".join(parts)


def group(folder: str | None, root: str) -> str:
    """What a run's neighbours share: ``demo/sweep`` of the jobs of a sweep, ``demo`` of single runs."""
    return place(folder, root).rpartition("/")[0] or place(folder, root)


def variable(key: str, *default: Any) -> str | None:
    """``oc.env`` for the variables of this project and of the job alone.

    Raises:
        UserError: for any other variable.
    """
    if not str(key).startswith(VARIABLES):
        raise UserError(
            f"oc.env: a configuration reads environment variables that begin with {' or '.join(VARIABLES)} alone, "
            f"found '{key}'"
        )
    return oc.env(key, *default)


def register() -> None:
    """Put them in place of OmegaConf's own."""
    OmegaConf.register_new_resolver("digest", digest, replace=True)
    OmegaConf.register_new_resolver("place", place, replace=True)
    OmegaConf.register_new_resolver("group", group, replace=True)
    OmegaConf.register_new_resolver("oc.env", variable, replace=True)
