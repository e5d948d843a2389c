"""A class label as the only token of a context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.protocols import Randomness, TextEncoder
from repalign.state import Cond, Tokens


class LabelTokenConditioner(nn.Module):
    """A trained embedding of the label as one token for cross-attention (LDM's ``ClassEmbedder``, class-conditional).

    It is optimised with the network and, as in the official code, not averaged. The null condition is label
    num_classes.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        dim: width of the token (LDM on ImageNet: 512).
        drop: probability with which a training sample loses its label.

    Raises:
        UserError: when ``drop`` is no probability.
    """

    reads = ("label",)
    text_encoders: Mapping[str, TextEncoder] = {}
    pooled_dim = None
    concat_channels = 0

    def __init__(self, num_classes: int, dim: int = 512, drop: float = 0.1) -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise UserError(f"conditioner.drop: expected a number in [0, 1], found {drop}")
        self.num_classes = num_classes
        self.context_dim = dim
        self.drop = drop
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        """One token per sample, [B, 1, D]."""
        label = batch["label"]
        if drop and "label" in drop:
            label = torch.where(drop["label"], self.num_classes, label)
        return Cond(text=Tokens(self.embedding(label).unsqueeze(1)))

    def null(self, batch: int, device: torch.device) -> Cond:
        """The token of label num_classes."""
        return self({"label": torch.full((batch,), self.num_classes, dtype=torch.int64, device=device)})

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """Which samples lose their label: {"label": bool [B]}."""
        return {"label": random.uniform("drop/label") < self.drop}
