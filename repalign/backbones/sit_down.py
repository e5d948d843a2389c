"""The U-shaped diffusion transformer of U-REPA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.taps import TapCollector
from repalign.errors import UserError
from repalign.nn.blocks import DiTBlock, Modulation, modulate
from repalign.nn.embed import TimeEmbedding, sincos_2d
from repalign.nn.init import xavier_linear_, xavier_patchify_, zero_
from repalign.nn.resample import TokenDown, TokenUp
from repalign.nn.token_io import PatchIO
from repalign.state import Cond, Output, Tokens, TokenSpec


class SiTDown(nn.Module):
    """SiT with a middle stage on half the grid and a skip connection over it (U-REPA, arXiv:2503.18414).

    Encoder blocks on the grid of patches; 2 x 2 tokens joined to one; middle blocks with positions, time and label
    embeddings of their own; tokens split again and fused with the encoder's output by a linear layer; decoder blocks;
    the final layer of SiT. Taps: ``encoder.k``, ``middle.k``, ``decoder.k`` after the k-th block of a stage, and
    ``mid``, the end of the middle stage.

    The official code could not be read: the paper says what the parts are, the details (separate embeddings, the order
    of the joined channels, one linear layer at each seam, the sizes) are this project's. The width is not doubled after
    the down-sampling and attention is SiT's own, as the authors remarked (YuchuanTian/DiC, issue 2).

    Args:
        latent_shape: (C, H, W) of the state.
        num_classes: labels are 0 .. num_classes - 1; label num_classes is the null condition.
        patch: patch size p.
        dim: width D.
        depth: number of blocks of encoder, middle and decoder.
        heads: number of attention heads, in every stage.
        mid_mult: width of the middle stage over D.
        mlp_ratio: hidden width of the MLP over the stage's width.
        qk_norm: normalise queries and keys of each head.
        variance_head: predict C more channels, given as ``Output.heads["variance"]``.

    Raises:
        UserError: when there are not three depths.
        ValueError: when patch or halving do not divide the latent, or the heads do not divide a width.
    """

    uses_carry = False

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        patch: int,
        dim: int,
        depth: Sequence[int],
        heads: int,
        mid_mult: int = 1,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        variance_head: bool = False,
    ) -> None:
        super().__init__()
        if len(depth) != 3:
            raise UserError(f"backbone.depth: expected three numbers (encoder, middle, decoder), found {list(depth)}")
        mid_dim = mid_mult * dim
        self.io = PatchIO(latent_shape, patch, dim, variance_head)
        grid = self.io.grid
        self.mid_grid = (grid[0] // 2, grid[1] // 2)
        self.pos_embed: Tensor
        self.pos_embed_mid: Tensor
        self.register_buffer("pos_embed", sincos_2d(dim, grid))
        self.register_buffer("pos_embed_mid", sincos_2d(mid_dim, self.mid_grid))
        self.time_embed = TimeEmbedding(dim)
        self.time_embed_mid = TimeEmbedding(mid_dim)
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.label_embed_mid = nn.Embedding(num_classes + 1, mid_dim)

        def stage(count: int, width: int) -> nn.ModuleList:
            return nn.ModuleList(DiTBlock(width, heads, mlp_ratio, qk_norm) for _ in range(count))

        self.encoder = stage(depth[0], dim)
        self.down = TokenDown(dim, mid_dim, grid)
        self.middle = stage(depth[1], mid_dim)
        self.up = TokenUp(mid_dim, dim, self.mid_grid)
        self.fuse = nn.Linear(2 * dim, dim)
        self.decoder = stage(depth[2], dim)
        self.final_modulation = Modulation(dim, 2)

        fine, coarse = TokenSpec(dim, grid), TokenSpec(mid_dim, self.mid_grid)
        self.tap_specs: Mapping[str, TokenSpec] = {
            **{f"encoder.{k}": fine for k in range(1, depth[0] + 1)},
            **{f"middle.{k}": coarse for k in range(1, depth[1] + 1)},
            "mid": coarse,
            **{f"decoder.{k}": fine for k in range(1, depth[2] + 1)},
        }
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights of DiT; the layers at the seams are xavier linears."""
        xavier_linear_(self)
        xavier_patchify_(self.io.patchify)
        for embed in (self.label_embed, self.label_embed_mid):
            nn.init.normal_(embed.weight, std=0.02)
        for layer in (*self.time_embed.linears, *self.time_embed_mid.linears):
            nn.init.normal_(layer.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, Modulation):
                zero_(part.linear)
        zero_(self.io.linear)

    @property
    def units(self) -> Sequence[nn.Module]:
        """The blocks, in the order of a call."""
        return [*self.encoder, *self.middle, *self.decoder]

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
        c = self.time_embed(t) + self.label_embed(cond.label)
        c_mid = self.time_embed_mid(t) + self.label_embed_mid(cond.label)

        h = self.io.embed(x_t) + self.pos_embed
        for k, block in enumerate(self.encoder, start=1):
            h = block(h, c)
            collector.offer(f"encoder.{k}", Tokens(h, self.io.grid))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        skip = h

        h = self.down(h) + self.pos_embed_mid
        for k, block in enumerate(self.middle, start=1):
            h = block(h, c_mid)
            collector.offer(f"middle.{k}", Tokens(h, self.mid_grid))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        collector.offer("mid", Tokens(h, self.mid_grid))
        if only_taps and collector.complete:
            return Output(taps=collector.found)

        h = self.fuse(torch.cat([self.up(h), skip], -1))
        for k, block in enumerate(self.decoder, start=1):
            h = block(h, c)
            collector.offer(f"decoder.{k}", Tokens(h, self.io.grid))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        shift, scale = self.final_modulation(c)
        pred, heads = self.io.unembed(modulate(h, shift, scale))
        return Output(pred, heads, collector.found)
