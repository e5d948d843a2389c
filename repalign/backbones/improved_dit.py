"""The improved diffusion transformer: the undivided baseline of DDT."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.taps import TapCollector
from repalign.nn.embed import TimeEmbedding
from repalign.nn.improved import ImprovedBlock, ModulatedNorm
from repalign.nn.init import xavier_patchify_, zero_
from repalign.nn.rotary import Rotary2d
from repalign.nn.token_io import PatchEmbed, PatchIO
from repalign.state import Cond, Output, Tokens, TokenSpec


class ImprovedDiT(nn.Module):
    """DiT with SwiGLU, RMSNorm, rotary positions and query-key norm (the baseline of DDT, arXiv:2504.05741).

    All blocks and the last norm are modulated by c = silu(embed(t) + embed(label)), one vector per sample. Taps
    ``block.k`` are the residual stream after the k-th block.

    Args:
        latent_shape: (C, H, W) of the state.
        num_classes: labels are 0 .. num_classes - 1; label num_classes is the null condition.
        patch: patch size p.
        dim: width D.
        depth: number of blocks.
        heads: number of attention heads; D / heads must be a multiple of 4.
        max_period: of the time embedding; DDT's networks are fed t in [0, 1] and have 10.

    Raises:
        ValueError: when patch, heads or the heads' width do not fit.
        UserError: at a call with a tap that does not exist.
    """

    uses_carry = False

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        max_period: float = 10.0,
    ) -> None:
        super().__init__()
        self.io = PatchIO(latent_shape, patch, dim)
        self.time_embed = TimeEmbedding(dim, max_period=max_period)
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.rotary = Rotary2d(dim // heads, self.io.grid)
        self.blocks = nn.ModuleList(ImprovedBlock(dim, heads) for _ in range(depth))
        self.final_norm = ModulatedNorm(dim)
        self.tap_specs: Mapping[str, TokenSpec] = {
            f"block.{k}": TokenSpec(dim, self.io.grid) for k in range(1, depth + 1)
        }
        improved_init_(self)

    @property
    def units(self) -> Sequence[nn.Module]:
        """The blocks, in the order of a call."""
        return [*self.blocks]

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
        """Predict from the noisy latent; see the protocol ``Backbone``."""
        collector = TapCollector(taps, self.tap_specs)
        c = F.silu(self.time_embed(t) + self.label_embed(cond.label)).unsqueeze(1)
        h = self.io.embed(x_t)
        for k, block in enumerate(self.blocks, start=1):
            h = block(h, c, self.rotary)
            collector.offer(f"block.{k}", Tokens(h, self.io.grid))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        pred, heads = self.io.unembed(self.final_norm(h, c))
        return Output(pred, heads, collector.found)


def improved_init_(backbone: nn.Module) -> None:
    """Initial weights of DDT's code: xavier patches, N(0, 0.02) embeddings, zero output; PyTorch's own for the rest.

    Deviation from the paper, as in its code: the blocks' modulations do not begin at zero, so blocks are no identity.
    """
    for part in backbone.modules():
        if isinstance(part, PatchEmbed):
            xavier_patchify_(part)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        elif isinstance(part, TimeEmbedding):
            for layer in part.linears:
                nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(part, ModulatedNorm):
            zero_(part.modulation.linear)
        elif isinstance(part, PatchIO):
            zero_(part.linear)
