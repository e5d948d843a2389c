"""Several conditions at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repalign.conditioners.derive import derived
from repalign.errors import UserError
from repalign.protocols import Autoencoder, Conditioner, Randomness, TextEncoder
from repalign.state import Cond, Tokens


class HybridConditioner(nn.Module):
    """The conditions of several conditioners: contexts joined over tokens, maps over channels (LDM's "hybrid").

    At most one of them gives a label. Each draws its own dropout.

    Args:
        parts: makers by name; each gets those of the other arguments that it asks for.
        num_classes, text_encoders, autoencoder: of the composition.

    Raises:
        UserError: when there is no part, or contexts have different widths.
    """

    def __init__(
        self,
        parts: Mapping[str, Callable[..., Conditioner]],
        num_classes: int,
        text_encoders: Mapping[str, TextEncoder],
        autoencoder: Autoencoder,
    ) -> None:
        super().__init__()
        facts = {"num_classes": num_classes, "text_encoders": text_encoders, "autoencoder": autoencoder}
        self.parts: dict[str, Conditioner] = {name: derived(make, **facts) for name, make in parts.items()}
        widths = {part.context_dim for part in self.parts.values() if part.context_dim is not None}
        if not self.parts or len(widths) > 1:
            raise UserError(f"conditioner.parts: expected contexts of one width, found {sorted(widths) or 'no part'}")
        self.trained = nn.ModuleDict({n: part for n, part in self.parts.items() if isinstance(part, nn.Module)})
        self.reads = tuple(dict.fromkeys(name for part in self.parts.values() for name in part.reads))
        self.text_encoders = {name: x for part in self.parts.values() for name, x in part.text_encoders.items()}
        self.context_dim = next(iter(widths), None)
        self.pooled_dim = next((part.pooled_dim for part in self.parts.values() if part.pooled_dim is not None), None)
        self.concat_channels = sum(part.concat_channels for part in self.parts.values())

    def forward(self, batch: Mapping[str, Any], drop: Mapping[str, Tensor] | None = None) -> Cond:
        """All conditions of a batch."""
        return joined([part(batch, drop) for part in self.parts.values()])

    def null(self, batch: int, device: torch.device) -> Cond:
        """The null of every part that has one."""
        return joined([part.null(batch, device) for part in self.parts.values()])

    def draw_drop(self, random: Randomness) -> Mapping[str, Tensor]:
        """What each part drops."""
        return {name: drop for part in self.parts.values() for name, drop in part.draw_drop(random).items()}


def joined(conds: list[Cond]) -> Cond:
    """Conditions of the same samples as one."""
    whole = conds[0]
    for cond in conds[1:]:
        text, spatial = [c.text for c in (whole, cond) if c.text], [c.spatial for c in (whole, cond)]
        maps = [m for m in spatial if m is not None]
        whole = Cond(
            text=Tokens(torch.cat([tokens.data for tokens in text], 1)) if text else None,
            spatial=torch.cat(maps, 1) if maps else None,
        ).completed(whole.completed(cond))
    return whole
