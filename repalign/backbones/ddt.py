"""The decoupled diffusion transformer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.improved_dit import improved_init_
from repalign.backbones.taps import TapCollector
from repalign.errors import UserError
from repalign.nn.embed import TimeEmbedding
from repalign.nn.improved import ImprovedBlock, ModulatedNorm
from repalign.nn.rotary import Rotary2d
from repalign.nn.token_io import PatchEmbed, PatchIO
from repalign.state import Cond, Output, Tokens, TokenSpec


class DDT(nn.Module):
    """A condition encoder and a velocity decoder, both over the noisy latent's patches (DDT, arXiv:2504.05741).

    The encoder is modulated by silu(embed(t) + embed(label)), one vector per sample, and gives the self-condition
    s = silu(embed(t) + its output), one vector per token. The decoder embeds the latent anew and is modulated by s
    token by token; the label reaches it through s alone. s is the carry: sent back, it replaces the encoder, which
    then is not run at all (neither t nor the label are read).

    Taps ``encoder.k`` and ``decoder.k`` are the residual stream after the k-th block of either half.

    Args:
        latent_shape: (C, H, W) of the state.
        num_classes: labels are 0 .. num_classes - 1; label num_classes is the null condition.
        patch: patch size p.
        dim: width D of both halves.
        depth: number of blocks, both halves together.
        encoder_depth: how many of them are the encoder's; the decoder has the rest (XL: 22 of 28).
        heads: number of attention heads; D / heads must be a multiple of 4.
        max_period: of the time embedding; official networks are fed t in [0, 1] and have 10.

    Raises:
        UserError: when a half would have no block; at a call, for a tap that does not exist, or one of the encoder
            together with a carry.
        ValueError: when patch, heads or the heads' width do not fit.
    """

    uses_carry = True

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        patch: int,
        dim: int,
        depth: int,
        encoder_depth: int,
        heads: int,
        max_period: float = 10.0,
    ) -> None:
        super().__init__()
        if not 0 < encoder_depth < depth:
            raise UserError(f"backbone.encoder_depth: expected 1 to depth - 1 = {depth - 1}, found {encoder_depth}")
        self.encoder_embed = PatchEmbed(latent_shape, patch, dim)
        self.io = PatchIO(latent_shape, patch, dim)
        self.time_embed = TimeEmbedding(dim, max_period=max_period)
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.rotary = Rotary2d(dim // heads, self.io.grid)
        self.encoder = nn.ModuleList(ImprovedBlock(dim, heads) for _ in range(encoder_depth))
        self.decoder = nn.ModuleList(ImprovedBlock(dim, heads) for _ in range(depth - encoder_depth))
        self.final_norm = ModulatedNorm(dim)
        spec = TokenSpec(dim, self.io.grid)
        self.tap_specs: Mapping[str, TokenSpec] = {
            **{f"encoder.{k}": spec for k in range(1, encoder_depth + 1)},
            **{f"decoder.{k}": spec for k in range(1, depth - encoder_depth + 1)},
        }
        improved_init_(self)

    @property
    def units(self) -> Sequence[nn.Module]:
        """The blocks, in the order of a call."""
        return [*self.encoder, *self.decoder]

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        """Predict from the noisy latent; see the protocol ``Backbone``. The carry is s [B, N, D]."""
        collector = TapCollector(taps, self.tap_specs)
        if carry is None:
            time = self.time_embed(t).unsqueeze(1)
            c = F.silu(time + self.label_embed(cond.label).unsqueeze(1))
            h = self._through("encoder", self.encoder, self.encoder_embed(x_t), c, collector, only_taps)
            if only_taps and collector.complete:
                return Output(taps=collector.found)
            carry = F.silu(time + h)
        elif any(tap.startswith("encoder.") for tap in taps):
            raise UserError(f"taps {', '.join(sorted(taps))}: a carry replaces the encoder, which has no taps then")
        h = self._through("decoder", self.decoder, self.io.embed(x_t), carry, collector, only_taps)
        if only_taps and collector.complete:
            return Output(taps=collector.found, carry=carry)
        pred, heads = self.io.unembed(self.final_norm(h, carry))
        return Output(pred, heads, collector.found, carry)

    def _through(
        self, half: str, blocks: nn.ModuleList, h: Tensor, c: Tensor, collector: TapCollector, only_taps: bool
    ) -> Tensor:
        """One half's blocks, up to the last tap when nothing else is wanted."""
        for k, block in enumerate(blocks, start=1):
            h = block(h, c, self.rotary)
            collector.offer(f"{half}.{k}", Tokens(h, self.io.grid))
            if only_taps and collector.complete:
                break
        return h
