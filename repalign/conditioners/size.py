"""The size of a picture as the condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.errors import UserError
from repalign.nn.precision import as_input
from repalign.protocols import Randomness, TextEncoder
from repalign.state import Cond


class SizeConditioner:
    """Height and width of the original picture and the aspect ratio it was cut to (PixArt-alpha's micro-conditions).

    ``Cond.size`` [B, 3] is what a batch holds as ``size``: height and width in pixels before resizing, height / width
    after cutting. For a picture that is drawn the generator gives the size it is drawn at. There is no null: guidance
    leaves the size in place.

    Raises:
        UserError: at a call for a batch of pictures without their sizes.
    """

    reads = ("size",)
    text_encoders: Mapping[str, TextEncoder] = {}
    context_dim = pooled_dim = None
    concat_channels = 0

    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        if "size" not in batch:
            raise UserError("conditioner: batches hold no sizes; set data.sizes=true, or conditioner=text")
        return Cond(size=as_input(batch["size"]))

    def null(self, batch: int, device: torch.device) -> Cond:
        """Nothing: the size stays."""
        return Cond()

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """Nothing is dropped."""
        return {}
