"""Handing a part those of the composition's facts that it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def derived(make: Callable[..., Any], **facts: Any) -> Any:
    """``make`` called with those facts whose names are among its arguments.

    Args:
        make: a class or a partial of one.
        facts: what the composition knows: number of classes, latent shape, autoencoder, ...
    """
    names = inspect.signature(make).parameters
    return make(**{name: value for name, value in facts.items() if name in names})
