"""Initial weights."""

from __future__ import annotations

import torch
from torch import nn


def xavier_linear_(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer inside (DiT; REPA applies it to its heads too)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def xavier_patchify_(conv: nn.Conv2d) -> None:
    """Xavier-uniform on the [D, C p p] matrix that a patch convolution is; zero bias."""
    with torch.no_grad():
        nn.init.xavier_uniform_(conv.weight.flatten(1))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Zero weights and bias: the layer begins by adding nothing (adaLN-Zero, ADM's last convolutions)."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
