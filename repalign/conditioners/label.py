"""Class labels as the condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.protocols import Randomness, TextEncoder
from repalign.state import Cond


class LabelConditioner:
    """Class labels 0 .. num_classes - 1; the null condition is label num_classes (the last row of the embedding).

    Args:
        num_classes: number of classes of the data.
        drop: probability with which a training sample loses its label (classifier-free guidance; DiT, SiT, REPA: 0.1).
    """

    reads = ("label",)
    text_encoders: Mapping[str, TextEncoder] = {}
    context_dim = None
    pooled_dim = None
    concat_channels = 0

    def __init__(self, num_classes: int, drop: float = 0.1) -> None:
        if not 0 <= drop <= 1:
            raise ValueError(f"conditioner.drop must be in [0, 1], found {drop}")
        self.num_classes = num_classes
        self.drop = drop

    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        cond = Cond(label=batch["label"])
        if not drop or "label" not in drop:
            return cond
        return cond.where(drop["label"], self.null(len(batch["label"]), batch["label"].device))

    def null(self, batch: int, device: torch.device) -> Cond:
        """The null condition for a batch."""
        return Cond(label=torch.full((batch,), self.num_classes, dtype=torch.int64, device=device))

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """Which samples lose their label: {"label": bool [B]}."""
        return {"label": random.uniform("drop/label") < self.drop}
