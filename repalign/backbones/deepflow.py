"""The deeply supervised transformer of DeepFlow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.taps import TapCollector
from repalign.errors import UserError
from repalign.nn.blocks import DiTBlock, Modulation, modulate
from repalign.nn.embed import TimeEmbedding, sincos_2d
from repalign.nn.init import xavier_linear_, xavier_patchify_, zero_
from repalign.nn.patch_head import PatchHead
from repalign.nn.token_io import PatchIO
from repalign.nn.vera import VeRA
from repalign.state import Cond, Output, State, Tokens, TokenSpec


class DeepFlow(nn.Module):
    """SiT cut into K branches, each with a velocity of its own and a time of its own (DeepFlow, arXiv:2503.14494).

    Branch k runs its blocks under c_k = embed(t_k) + embed(label). After every branch but the last an intermediate head
    gives ``heads["velocity.k"]``, a :class:`repalign.nn.vera.VeRA` block makes the tokens of the next branch from these
    features, the embedded input and the gap t_{k+1} - t_k, and its acceleration features give
    ``heads["acceleration.k"]``, both heads under c_k. The prediction is the last branch's velocity. The noisy latent is
    that of t_1. Taps: ``block.i`` after the i-th block, ``vera.k`` after the k-th VeRA block.

    Times [B, K] are one a branch (:class:`repalign.paths.time.Ladder`); a time [B], as samplers give it, is every
    branch's. The intermediate head is one for all branches, and so is the acceleration head.

    Args:
        latent_shape: (C, H, W) of the state.
        num_classes: labels are 0 .. num_classes - 1; label num_classes is the null condition.
        patch: patch size p.
        dim: width D.
        depth: number of blocks.
        heads: number of attention heads.
        branches: number K of branches of equal length, or the number of blocks of each.
        acceleration_hidden: hidden width of the acceleration MLP.
        mlp_ratio: hidden width of a block's MLP over D.
        qk_norm: normalise queries and keys of each head of the blocks.
        scale_limit: bound of the scale that VeRA takes from the time gap; None for none.

    Raises:
        ValueError: when the patch does not divide the latent or the heads do not divide the width.
        UserError: when the branches do not make up the depth; at a call with a tap that does not exist, or with another
            number of times than branches.
    """

    uses_carry = False
    times = ("sample", "branch")

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        num_classes: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        branches: int | Sequence[int],
        acceleration_hidden: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        scale_limit: float | None = None,
    ) -> None:
        super().__init__()
        lengths = branch_lengths(depth, branches)
        self.branches = len(lengths)
        self.ends = list(accumulate(lengths))  # the last block of every branch, counted from 1
        self.io = PatchIO(latent_shape, patch, dim)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(dim, self.io.grid))
        self.time_embed = TimeEmbedding(dim)
        self.gap_embed = TimeEmbedding(2 * dim)
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.vera = nn.ModuleList(VeRA(dim, heads, acceleration_hidden, scale_limit) for _ in lengths[1:])
        self.velocity_head = PatchHead(dim, latent_shape[0], self.io.grid, patch)
        self.acceleration_head = PatchHead(dim, latent_shape[0], self.io.grid, patch)
        self.final_modulation = Modulation(dim, 2)
        names = [f"block.{i}" for i in range(1, depth + 1)] + [f"vera.{k}" for k in range(1, self.branches)]
        self.tap_specs: Mapping[str, TokenSpec] = {name: TokenSpec(dim, self.io.grid, self.io.prefix) for name in names}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights: DiT's; the modulations of VeRA and the linear layers of all heads are zero too."""
        xavier_linear_(self)
        xavier_patchify_(self.io.patchify)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for layer in (*self.time_embed.linears, *self.gap_embed.linears):
            nn.init.normal_(layer.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, Modulation):
                zero_(part.linear)
        for head in (self.io, self.velocity_head, self.acceleration_head):
            zero_(head.linear)

    @property
    def units(self) -> Sequence[nn.Module]:
        """The blocks, in the order of a call."""
        return [*self.blocks]

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"] | Float[Tensor, "b k"],
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        """Predict from the noisy latent of the first time; see the protocol ``Backbone``."""
        collector = TapCollector(taps, self.tap_specs)
        times = self._time_of_each_branch(t)
        label = self.label_embed(cond.label)
        c = self.time_embed(times[0]) + label
        x = self.io.embed(x_t) + self.pos_embed
        h, k = x, 1
        heads: dict[str, State] = {}
        for i, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            collector.offer(f"block.{i}", Tokens(h, self.io.grid, self.io.prefix))
            if i in self.ends[:-1]:
                heads[f"velocity.{k}"] = self.velocity_head(h, c)
                acceleration, h = self.vera[k - 1](h, x, self.gap_embed(times[k] - times[k - 1]))
                heads[f"acceleration.{k}"] = self.acceleration_head(acceleration, c)
                collector.offer(f"vera.{k}", Tokens(h, self.io.grid, self.io.prefix))
                c = self.time_embed(times[k]) + label
                k += 1
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        shift, scale = self.final_modulation(c)
        pred, _ = self.io.unembed(modulate(h, shift, scale))
        return Output(pred, heads, collector.found)

    def _time_of_each_branch(self, t: Tensor) -> Sequence[Tensor]:
        if t.ndim == 1:
            return [t] * self.branches
        if t.shape[1] != self.branches:
            raise UserError(
                f"time_sampler: {t.shape[1]} times a sample for a backbone of {self.branches} branches; set "
                "time_sampler.rungs to the number of branches"
            )
        return t.unbind(1)


def branch_lengths(depth: int, branches: int | Sequence[int]) -> list[int]:
    """Number of blocks of each branch.

    Raises:
        UserError: when they do not make up the depth.
    """
    if isinstance(branches, int):
        if branches < 1 or depth % branches:
            raise UserError(
                f"backbone.branches: {depth} blocks cannot be cut into {branches} equal branches; choose a divisor of "
                "backbone.depth, or list the number of blocks of each branch"
            )
        return [depth // branches] * branches
    if sum(branches) != depth or min(branches) < 1:
        raise UserError(f"backbone.branches: {list(branches)} blocks do not make up backbone.depth = {depth}")
    return list(branches)
