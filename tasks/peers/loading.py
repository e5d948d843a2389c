"""Importing from a checkout, and answering its calls for random numbers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from repalign.errors import UserError

# What an official loss draws with, and a tensor of as many numbers.
Drawn = tuple[Callable[..., Tensor], Tensor]
DRAWING = (torch.rand, torch.randn, torch.rand_like, torch.randn_like)


def import_from(root: Path, *names: str) -> list[Any]:
    """Modules of a checkout by the names under which they import each other.

    They leave ``sys.modules`` again, so that two checkouts and our own modules of the same name do not meet, and
    nothing is written into the checkout.

    Raises:
        UserError: when one cannot be imported, with Python's own reason.
    """
    with _in_front(root, {name.split(".")[0] for name in names}):
        try:
            return [importlib.import_module(name) for name in names]
        except Exception as error:  # the code of a checkout may raise anything
            raise UserError(
                f"task.peer: {', '.join(names)} of '{root}' cannot be imported ({type(error).__name__}: {error}); is "
                "the checkout whole, and is what it imports installed?"
            ) from error


@contextmanager
def _in_front(root: Path, tops: set[str]) -> Iterator[None]:
    def taken() -> list[str]:
        return [name for name in sys.modules if name.split(".")[0] in tops]

    hidden = {name: sys.modules.pop(name) for name in taken()}
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(root.resolve()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(root.resolve()))
        sys.dont_write_bytecode = written
        for name in taken():
            del sys.modules[name]
        sys.modules.update(hidden)


class Replay(TorchFunctionMode):
    """Inside, calls for random numbers are answered from a list, in its order.

    Raises:
        UserError: for a call that the list does not foresee: the checkout is another version than the one known here.
    """

    def __init__(self, draws: Sequence[Drawn]) -> None:
        super().__init__()
        self.left = list(draws)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in DRAWING:
            return result
        if not self.left or self.left[0][0] is not func or self.left[0][1].numel() != result.numel():
            expected = f"torch.{self.left[0][0].__name__} of {self.left[0][1].numel()}" if self.left else "none"
            raise UserError(
                f"task.peer: its loss draws torch.{func.__name__} of {result.numel()} numbers where {expected} was "
                "expected; this is another version of the official code than the one known here"
            )
        return self.left.pop(0)[1].reshape(result.shape).to(result)
