"""Boxes of objects as the context of cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.protocols import Randomness, TextEncoder
from repalign.state import Cond, Tokens


class LayoutConditioner(nn.Module):
    """Layout-to-image: three tokens an object (class, top left, bottom right) through a trained transformer (LDM).

    Places are cells of a ``grid`` x ``grid`` raster. Reads ``boxes`` [B, M, 5]: class, x_0, y_0, x_1, y_1 with
    coordinates in [0, 1] from the upper left corner; rows of class -1 are no object. It is optimised with the network
    and not averaged. The null condition is a layout without objects. LDM: 30 objects (and two tokens for the crop), 512
    wide, 16 layers.

    Deviation: a pre-norm encoder of ``torch.nn``, where LDM takes one of x-transformers; no tokens for the crop.

    Args:
        object_classes: number of classes of objects.
        objects: M, objects a picture; further ones are left out.
        grid: side of the raster.
        dim, depth, heads: of the transformer.
        drop: probability with which a training sample loses its layout.

    Raises:
        UserError: at a call for a batch without boxes.
    """

    reads = ("boxes",)
    text_encoders: Mapping[str, TextEncoder] = {}
    pooled_dim = None
    concat_channels = 0

    def __init__(
        self,
        object_classes: int,
        objects: int = 30,
        grid: int = 64,
        dim: int = 512,
        depth: int = 16,
        heads: int = 8,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise UserError(f"conditioner.drop: expected a number in [0, 1], found {drop}")
        self.object_classes = object_classes
        self.objects = objects
        self.grid = grid
        self.context_dim = dim
        self.drop = drop
        # First "no object", then the classes, then the cells.
        self.embedding = nn.Embedding(1 + object_classes + grid**2, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(3 * objects, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        """Token states [B, 3 M, D]."""
        if "boxes" not in batch:
            raise UserError("conditioner: the data have no boxes ('boxes' [B, M, 5] in a batch); choose data=coco")
        tokens = self.tokens(batch["boxes"])
        if drop and "layout" in drop:
            tokens = torch.where(drop["layout"][:, None], 0, tokens)
        return Cond(text=Tokens(self.transformer(self.embedding(tokens) + self.positions)))

    def tokens(self, boxes: Float[Tensor, "b m 5"]) -> Int[Tensor, "b n"]:
        """Numbers of the tokens, 0 where there is no object."""
        found = boxes[:, : self.objects]
        label, corners = found[..., 0].long(), found[..., 1:]
        cells = (corners * self.grid).long().clamp(0, self.grid - 1)
        first = 1 + self.object_classes
        places = [first + cells[..., k + 1] * self.grid + cells[..., k] for k in (0, 2)]
        tokens = torch.stack([1 + label, *places], -1) * (label >= 0).unsqueeze(-1)
        missing = self.objects - found.shape[1]
        return torch.cat([tokens, tokens.new_zeros(len(tokens), missing, 3)], 1).flatten(1)

    def null(self, batch: int, device: torch.device) -> Cond:
        """The states of a layout without objects."""
        return self({"boxes": torch.full((batch, 1, 5), -1.0, device=device)})

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """Which samples lose their layout: {"layout": bool [B]}."""
        return {"layout": random.uniform("drop/layout") < self.drop}
