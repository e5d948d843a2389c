"""The multimodal diffusion transformer of Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.taps import TapCollector
from repalign.errors import UserError
from repalign.nn.blocks import Modulation, modulate
from repalign.nn.embed import TimeEmbedding, VectorEmbedding, unpatchify
from repalign.nn.init import xavier_linear_, xavier_patchify_, zero_
from repalign.nn.joint import JointBlock
from repalign.nn.positions import central, paper_rule, position_table
from repalign.nn.token_io import PatchEmbed
from repalign.state import Cond, Output, Tokens, TokenSpec

HEAD_DIM = 64
PATCH_PIXELS = 16  # of SD3: an autoencoder of 8, patches of 2


class MMDiT(nn.Module):
    """Two streams of tokens, text and image, that meet in joint attention (SD3, arXiv:2403.03206; SD3.5 medium).

    Image tokens are p x p patches plus the middle of a fixed position table; text tokens are the conditioner's states
    through one linear layer, without positions and without a mask (padding is attended to, as in the official code).
    All blocks are modulated by c = embed(time_scale t) + embed(pooled vector). The last block reads the text and does
    not write it. Taps: ``block.k`` are the image tokens after the k-th block, ``block.k/text`` the text tokens.
    Pictures may have any size that the table holds; ``cond.skip`` passes over blocks, both streams unchanged.

    Args:
        latent_shape: (C, H, W) of the state; H and W fix the grid that taps announce.
        context_dim: width of the text states.
        pooled_dim: width of the pooled text vector; None for a network that has none (REPA's text-to-image network).
        patch: patch size p.
        depth: number of blocks d.
        dim: width D; None for 64 d, the rule of SD3.
        heads: number of attention heads; None for d.
        mlp_ratio: hidden width of the MLPs over D.
        qk_norm: RMS-normalise queries and keys of each head, in each stream (SD3.5).
        dual_blocks: blocks with a second attention over the image alone, 1-based (SD3.5 medium: the first 13).
        time_scale: what t is multiplied by: 1000 in SD3, 1 in REPA's network.
        table_side: side of the position table in patches; None for the longer side of the latent.
        table_spacing, table_origin: see :func:`repalign.nn.positions.position_table`; None for the paper's rule
            (:func:`repalign.nn.positions.paper_rule`) with S = 16 px for each patch of the latent's longer side.
        zero_init: zero modulations and zero output, as DiT; REPA's network begins with PyTorch's own initial weights.

    Initial weights are DiT's; those of the official run are not published.

    Raises:
        ValueError: when the patch does not divide the latent or the heads do not divide the width.
        UserError: for a dual block that is none; at a call with a tap or a block that does not exist, or
            with a picture larger than the table.
    """

    uses_carry = False
    skips_blocks = True

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        context_dim: int,
        pooled_dim: int | None,
        patch: int,
        depth: int,
        dim: int | None = None,
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        dual_blocks: Sequence[int] = (),
        time_scale: float = 1000.0,
        table_side: int | None = None,
        table_spacing: float | None = 1.0,
        table_origin: float | None = 0.0,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if not set(dual_blocks) <= set(range(1, depth + 1)):
            raise UserError(
                f"backbone.dual_blocks: expected numbers from 1 to depth={depth}, found {list(dual_blocks)}"
            )
        dim, heads = dim or HEAD_DIM * depth, heads or depth
        channels, height, width = latent_shape
        grid = (height // patch, width // patch)
        self.patch = patch
        self.time_scale = time_scale
        side = table_side or max(grid)
        origin, spacing = paper_rule(side, PATCH_PIXELS * max(grid), PATCH_PIXELS)
        self.table_spacing = spacing if table_spacing is None else table_spacing
        self.patchify = PatchEmbed(latent_shape, patch, dim)
        self.pos_embed = nn.Buffer(
            position_table(dim, side, self.table_spacing, origin if table_origin is None else table_origin)
        )
        self.time_embed = TimeEmbedding(dim)
        self.pooled_embed = None if pooled_dim is None else VectorEmbedding(pooled_dim, dim)
        self.text_embed = nn.Linear(context_dim, dim)
        self.blocks = nn.ModuleList(
            JointBlock(dim, heads, mlp_ratio, qk_norm, dual=k in dual_blocks, last=k == depth)
            for k in range(1, depth + 1)
        )
        self.final_modulation = Modulation(dim, 2)
        self.linear = nn.Linear(dim, patch * patch * channels)
        central(self.pos_embed, grid)  # the latent fits into the table
        image = {f"block.{k}": TokenSpec(dim, grid) for k in range(1, depth + 1)}
        self.tap_specs: Mapping[str, TokenSpec] = {
            **image,
            **{f"block.{k}/text": TokenSpec(dim) for k in range(1, depth)},
        }
        if zero_init:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights of DiT: xavier linears, N(0, 0.02) in the embeddings of c, zero modulations and output."""
        xavier_linear_(self)
        xavier_patchify_(self.patchify)
        for embed in (self.time_embed, self.pooled_embed):
            for layer in () if embed is None else embed.linears:
                nn.init.normal_(layer.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, Modulation):
                zero_(part.linear)
        zero_(self.linear)

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
        self._check_skip(cond.skip)
        assert cond.text is not None, "a text condition"
        grid = (x_t.shape[-2] // self.patch, x_t.shape[-1] // self.patch)
        c = self.condition(t, cond.pooled)
        image = self.embed(x_t)
        text = self.text_embed(cond.text.data)
        for k, block in enumerate(self.blocks, start=1):
            if k not in cond.skip:
                image, text = block(image, text, c)
            collector.offer(f"block.{k}", Tokens(image, grid))
            collector.offer(f"block.{k}/text", Tokens(text))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        shift, scale = self.final_modulation(c)
        return Output(unpatchify(self.linear(modulate(image, shift, scale)), grid, self.patch), {}, collector.found)

    def embed(self, x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patches and their positions."""
        grid = (x_t.shape[-2] // self.patch, x_t.shape[-1] // self.patch)
        return self.patchify(x_t) + central(self.pos_embed, grid)

    def condition(self, t: Float[Tensor, " b"], pooled: Float[Tensor, "b p"] | None) -> Float[Tensor, "b d"]:
        """c: what modulates every block."""
        c = self.time_embed(self.time_scale * t)
        if self.pooled_embed is None:
            return c
        assert pooled is not None, "a pooled text vector"
        return c + self.pooled_embed(pooled)

    def _check_skip(self, skip: tuple[int, ...]) -> None:
        for k in skip:
            if not 1 <= k <= len(self.blocks):
                raise UserError(f"guidance.layers: no block {k}; valid: 1 to {len(self.blocks)}")
