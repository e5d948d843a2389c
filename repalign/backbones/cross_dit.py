"""The diffusion transformer with cross-attention to text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.taps import TapCollector
from repalign.nn.attention import CrossAttention
from repalign.nn.blocks import MLP, modulate
from repalign.nn.cross import BlockModulation, CrossBlock, SharedModulation
from repalign.nn.embed import sincos_at, unpatchify
from repalign.nn.init import xavier_linear_, xavier_patchify_, zero_
from repalign.nn.token_io import PatchEmbed
from repalign.state import Cond, Output, Tokens, TokenSpec


class CrossDiT(nn.Module):
    """DiT whose blocks also attend to text tokens (PixArt-alpha, arXiv:2310.00426; the CrossDiT of SD3's ablation).

    Patches plus fixed positions; in every block self-attention, cross-attention to the projected text, MLP. Taps
    ``block.k`` are the residual stream after the k-th block. Positions are those of a square of ``base_side`` patches,
    stretched over the picture, so a picture may have any size. The cross-attention's output layers begin at zero: a
    fresh network ignores the text.

    Args:
        latent_shape: (C, H, W) of the state; H and W fix the grid that taps announce.
        context_dim: width of the text states.
        pooled_dim: width of the pooled text vector, or None; only :class:`repalign.nn.cross.PooledModulation` reads it.
        patch: patch size p.
        dim: width D.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over D.
        qk_norm: RMS-normalise queries and keys of each head.
        modulation: makes the modulation from (D, depth, pooled_dim): adaLN-single, or adaLN-Zero with pooled text.
        text_mlp: two layers with a GELU from the text states to D (PixArt), or one linear layer.
        text_mask: hide the padding of the text (PixArt); SD3's text is not masked.
        cross_norm: LayerNorm without parameters before the cross-attention.
        variance_head: predict C more channels, given as ``Output.heads["variance"]``.
        time_scale: what t is multiplied by: 1000 for a flow, 1 behind the clock ``steps``.
        base_side: side of the square whose positions are stretched, in patches; None for the latent's own height.
        interpolation: positions are divided by it (PixArt-alpha at 1024 pixels: 2).

    Raises:
        ValueError: when the patch does not divide the latent or the heads do not divide the width.
        UserError: at a call with a tap that does not exist.
    """

    uses_carry = False

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        context_dim: int,
        pooled_dim: int | None,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        modulation: Callable[[int, int, int | None], BlockModulation] = SharedModulation,
        text_mlp: bool = True,
        text_mask: bool = True,
        cross_norm: bool = False,
        variance_head: bool = False,
        time_scale: float = 1000.0,
        base_side: int | None = None,
        interpolation: float = 1.0,
    ) -> None:
        super().__init__()
        channels, height, width = latent_shape
        grid = (height // patch, width // patch)
        self.patch = patch
        self.dim = dim
        self.text_mask = text_mask
        self.cross_norm = cross_norm
        self.variance_head = variance_head
        self.time_scale = time_scale
        self.base_side = base_side or grid[0]
        self.interpolation = interpolation
        self.grid = grid
        self.patchify = PatchEmbed(latent_shape, patch, dim)
        self.pos_embed = nn.Buffer(self.positions(grid), persistent=False)
        self.modulation = modulation(dim, depth, pooled_dim)
        self.text_embed = MLP(context_dim, dim, dim) if text_mlp else nn.Linear(context_dim, dim)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, mlp_ratio, qk_norm, cross_norm) for _ in range(depth))
        self.linear = nn.Linear(dim, patch * patch * channels * (2 if variance_head else 1))
        self.tap_specs: Mapping[str, TokenSpec] = {f"block.{k}": TokenSpec(dim, grid) for k in range(1, depth + 1)}
        self.reset_parameters()

    @property
    def reads_size(self) -> bool:
        """Whether height, width and aspect ratio of the picture are embedded."""
        return getattr(self.modulation, "size_embed", None) is not None

    def reset_parameters(self) -> None:
        """Initial weights of DiT; N(0, 0.02) in the text projection, zero output of cross-attention and network."""
        xavier_linear_(self)
        xavier_patchify_(self.patchify)
        self.modulation.reset_parameters()
        for layer in self.text_embed.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, CrossAttention):
                zero_(part.proj)
        zero_(self.linear)

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """Positions p base_side / (side interpolation) of a grid's rows and columns."""
        rows, columns = (
            torch.arange(side, dtype=torch.float64) * (self.base_side / side / self.interpolation) for side in grid
        )
        return sincos_at(self.dim, rows, columns)

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
        assert cond.text is not None, "a text condition"
        grid = (x_t.shape[-2] // self.patch, x_t.shape[-1] // self.patch)
        vectors, (shift, scale) = self.modulation(self.time_scale * t, cond)
        text = self.text_embed(cond.text.data)
        mask = cond.text_mask if self.text_mask else None
        h = self.embed(x_t)
        for k, (block, six) in enumerate(zip(self.blocks, vectors, strict=True), start=1):
            h = block(h, text, six, mask)
            collector.offer(f"block.{k}", Tokens(h, grid))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        image = unpatchify(self.linear(modulate(h, shift, scale)), grid, self.patch)
        if not self.variance_head:
            return Output(image, {}, collector.found)
        pred, variance = image.chunk(2, dim=1)
        return Output(pred, {"variance": variance}, collector.found)

    def embed(self, x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Patches and their positions."""
        grid = (x_t.shape[-2] // self.patch, x_t.shape[-1] // self.patch)
        table = self.pos_embed if grid == self.grid else self.positions(grid).to(x_t)
        return self.patchify(x_t) + table
