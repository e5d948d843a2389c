"""Packages that only some layouts need."""

from __future__ import annotations

import importlib
from types import ModuleType

from repalign.errors import UserError


def need(module: str, key: str, extra: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: dotted name.
        key: the configuration key that asks for it, with its value.
        extra: of this project that brings the package.

    Raises:
        UserError: when it is not installed; the line says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{key}: needs a package that is not installed ({error}); pip install 'repalign[{extra}]'"
        ) from error
