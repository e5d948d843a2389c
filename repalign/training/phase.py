"""One part of a training round that has its own loss, its own optimizer and its own view of what is trainable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass(frozen=True)
class Phase:
    """What moves, what stays still, and how, while one loss of a round is differentiated.

    A round is one batch through all phases in turn (REPA-E: autoencoder, discriminator, denoiser). Gradients pass
    through parts that do not move; their own gradients are not computed.

    Attributes:
        trains: names of the parts whose parameters this phase moves.
        optimizer: from those parameters to their optimizer.
        scheduler: from that optimizer to its learning-rate schedule, stepped once per round; None for a constant one.
        evals: names of the parts that are in evaluation mode meanwhile (running statistics stand still, no dropout).
        clip: limit of the global gradient norm over ``trains``; None measures it and clips nothing.
        start: rounds before this one pass the phase over (a discriminator that joins late).
    """

    trains: Sequence[str]
    optimizer: MakeOptimizer
    scheduler: MakeScheduler | None = None
    evals: Sequence[str] = ()
    clip: float | None = None
    start: int = 0


@contextmanager
def only(phase: Phase, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the phase's parts alone ask for gradients, and its ``evals`` are in evaluation mode.

    A parameter that is never trained (frozen when it came in) stays frozen; afterwards everything is as before.

    Args:
        phase: whose names are among ``parts``.
        parts: every part that any phase trains, by name; they share no parameters.
    """
    stilled = [p for name, part in parts.items() if name not in phase.trains for p in part.parameters()]
    stilled = [p for p in stilled if p.requires_grad]
    modes = [(module, module.training) for name in phase.evals for module in parts[name].modules()]
    for parameter in stilled:
        parameter.requires_grad_(False)
    for name in phase.evals:
        parts[name].eval()
    try:
        yield
    finally:
        for parameter in stilled:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
