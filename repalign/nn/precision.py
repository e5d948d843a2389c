"""Precision of inputs and losses."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precisions to float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_input(x: Tensor) -> Tensor:
    """What networks read: float32, or float64 where that is the default type (``precision=64-true`` sets it)."""
    return x.to(torch.promote_types(torch.float32, torch.get_default_dtype()))
