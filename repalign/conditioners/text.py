"""Captions as the context of cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repalign.errors import UserError, unknown_choice
from repalign.protocols import Randomness, TextEncoder
from repalign.state import Cond, Tokens


class TextConditioner:
    """Token states of a frozen text encoder, padding included (LDM, Stable Diffusion 1: CLIP-L's 77 x 768).

    Read from the batch's ``text/<name>`` where a store has them, otherwise encoded from its captions. The null
    condition is the empty caption.

    Args:
        text_encoders: by name.
        encoder: name of the one that is read.
        drop: probability with which a training sample loses its caption (Stable Diffusion: 0.1).

    Raises:
        UserError: when there is no text encoder of that name, or at a call for a batch without captions.
    """

    reads = ("caption",)
    concat_channels = 0

    def __init__(self, text_encoders: Mapping[str, TextEncoder], encoder: str = "main", drop: float = 0.1) -> None:
        if not 0 <= drop <= 1:
            raise UserError(f"conditioner.drop: expected a number in [0, 1], found {drop}")
        if encoder not in text_encoders:
            raise unknown_choice(
                "conditioner.encoder", encoder, text_encoders, "text encoder; choose one by text_encoder=..."
            )
        self.name = encoder
        self._encoder = (text_encoders[encoder],)  # in a tuple, so that no module registers it a second time
        self.context_dim = text_encoders[encoder].spec.dim
        self.drop = drop
        self._empty: Tensor | None = None

    def __call__(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        """Token states [B, N, D]."""
        stored = batch.get(f"text/{self.name}")
        if stored is None:
            if batch.get("caption") is None:
                raise UserError("conditioner: the data have no captions; choose data with captions (openmoji, cc12m)")
            stored = self._encoder[0](batch["caption"]).data
        cond = Cond(text=Tokens(stored.float()))
        if not drop or "text" not in drop:
            return cond
        return cond.where(drop["text"], self.null(len(stored), stored.device))

    def null(self, batch: int, device: torch.device) -> Cond:
        """States of the empty caption, [B, N, D]."""
        if self._empty is None:
            self._empty = self._encoder[0]([""]).data.float()
        self._empty = self._empty.to(device)
        return Cond(text=Tokens(self._empty.expand(batch, -1, -1)))

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """Which samples lose their caption: {"text": bool [B]}."""
        return {"text": random.uniform("drop/text") < self.drop}
