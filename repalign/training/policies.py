"""What is done to a backbone's blocks to save memory or time; what the network computes stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from repalign.errors import UserError
from repalign.nn.attention import Attending
from repalign.nn.attention_backends import Backend
from repalign.protocols import Backbone

# Changes a backbone in place; names of parameters and keys of the state dict stay.
Policy = Callable[[Backbone], None]


def units_of(backbone: Backbone) -> Sequence[nn.Module]:
    """The blocks of a backbone, in the order of a call.

    Raises:
        UserError: when it does not say which they are.
    """
    units = getattr(backbone, "units", None)
    if not units:
        raise UserError(
            f"backbone: {type(backbone).__name__} lists no blocks (attribute `units`), so they cannot be treated one "
            "by one; set activations=keep, compile=none and another trainer than fsdp"
        )
    return units


def as_it_is(backbone: Backbone) -> None:
    """Nothing is done."""


def attend_by(backbone: Backbone, backend: Backend) -> None:
    """Attention of the whole network by another backend; what it computes is the same up to rounding.

    Args:
        backbone: every layer of it that attends is changed in place.
        backend: see :mod:`repalign.nn.attention_backends`.

    Raises:
        UserError: when nothing in the network attends by a backend.
    """
    assert isinstance(backbone, nn.Module)
    layers = [part for part in backbone.modules() if isinstance(part, Attending)]
    if not layers:
        raise UserError(f"attention: {type(backbone).__name__} has no layer that attends; set attention=sdpa")
    for layer in layers:
        layer.backend = backend


def recompute(backbone: Backbone, every: int = 1) -> None:
    """Activation checkpointing (arXiv:1604.06174): the inside of a block is computed again in the backward pass.

    Blocks 1, 1 + every, 1 + 2 every, ... keep their inputs and outputs alone. Taps are outputs of blocks and so are not
    computed twice; dropout sees the same random state both times. Costs about a third of a step's time where all blocks
    are recomputed; without gradients nothing changes.

    Args:
        backbone: its ``units`` are changed in place.
        every: of so many blocks one is recomputed.

    Raises:
        UserError: when ``every`` is below 1.
    """
    if every < 1:
        raise UserError(f"activations.every: expected 1 or more, found {every}")
    for block in units_of(backbone)[::every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(backbone: Backbone, **options: Any) -> None:
    """``torch.compile`` of each block (regional compilation): blocks of one kind share their code, so a deep network
    compiles about as fast as one block.

    Args:
        backbone: its ``units`` are changed in place.
        options: of ``torch.compile``.
    """
    for block in units_of(backbone):
        block.compile(**options)


def compile_network(backbone: Backbone, **options: Any) -> None:
    """``torch.compile`` of the whole network, once.

    Args:
        backbone: changed in place.
        options: of ``torch.compile``.
    """
    assert isinstance(backbone, nn.Module)
    backbone.compile(**options)
