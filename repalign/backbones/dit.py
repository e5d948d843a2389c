"""The diffusion transformer of DiT, SiT and REPA."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from repalign.backbones.taps import TapCollector
from repalign.nn.attention import same_group
from repalign.nn.blocks import DiTBlock, Modulation, modulate, over_tokens
from repalign.nn.embed import TimeEmbedding, fixed_or_trained
from repalign.nn.init import xavier_linear_, zero_
from repalign.nn.token_io import PatchIO
from repalign.protocols import TokenIO
from repalign.state import Cond, Output, State, StateShape, Tokens, TokenSpec


class DiT(nn.Module):
    """Class-conditional transformer over latent patches with adaLN-Zero (DiT, arXiv:2212.09748; SiT, arXiv:2401.08740).

    Tokens of p x p patches plus fixed sine-cosine positions pass ``depth`` blocks that are modulated by
    c = embed(t) + embed(label); a modulated norm and a linear layer return to the latent. How the state becomes tokens
    and returns is the token io's business: with another one the same network denoises several streams. Taps
    ``block.k`` are the residual stream after the k-th block. The time is embedded as it comes, see
    :mod:`repalign.backbones.clocks`; a time [B, N] of each token modulates token by token, and tokens whose
    ``cond.groups`` differ do not see each other.

    Args:
        latent_shape: (C, H, W) of the state, or the shape of each stream by name.
        num_classes: labels are 0 .. num_classes - 1; label num_classes is the null condition.
        patch: patch size p.
        dim: width D.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP over D.
        qk_norm: normalise queries and keys of each head.
        variance_head: predict C more channels, given as ``Output.heads["variance"]``; DiT trains them, SiT's official
            code computes and drops them.
        train_positions: train the positions from their sine-cosine values on. DiT, SiT and REPA keep them fixed;
            REPA-E's official joint run trains them, because it unfreezes every parameter after the autoencoder's pass.
        token_io: makes the token io from (shape of the state, patch, width, variance head); patches alone by default.
        max_period: of the time embedding. 10000^(128/127) gives the frequencies of diffusers' DiT, 10000^(-k/127).

    Raises:
        ValueError: when the patch does not divide the latent or the heads do not divide the width.
        UserError: at a call with a tap that does not exist.
    """

    uses_carry = False
    times = ("sample", "group")

    def __init__(
        self,
        latent_shape: StateShape,
        num_classes: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        variance_head: bool = False,
        train_positions: bool = False,
        token_io: Callable[..., TokenIO] = PatchIO,
        max_period: float = 10000.0,
    ) -> None:
        super().__init__()
        self.io = token_io(latent_shape, patch, dim, variance_head)
        self.pos_embed = fixed_or_trained(self.io.positions(), train_positions)
        self.time_embed = TimeEmbedding(dim, max_period=max_period)
        self.label_embed = nn.Embedding(num_classes + 1, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_modulation = Modulation(dim, 2)
        self.tap_specs: Mapping[str, TokenSpec] = {
            f"block.{k}": TokenSpec(dim, self.io.grid, self.io.prefix) for k in range(1, depth + 1)
        }
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights of DiT: xavier linears, N(0, 0.02) embeddings, zero modulations and zero output."""
        xavier_linear_(self)
        self.io.reset_parameters()
        nn.init.normal_(self.label_embed.weight, std=0.02)
        for layer in self.time_embed.linears:
            nn.init.normal_(layer.weight, std=0.02)
        for part in self.modules():
            if isinstance(part, Modulation):
                zero_(part.linear)

    @property
    def units(self) -> Sequence[nn.Module]:
        """The blocks, in the order of a call."""
        return [*self.blocks]

    def forward(
        self,
        x_t: State,
        t: Float[Tensor, "*b"],
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        """Predict from the noisy state; see the protocol ``Backbone``."""
        collector = TapCollector(taps, self.tap_specs)
        c = over_tokens(self.time_embed(t)) + over_tokens(self.label_embed(cond.label))
        mask = None if cond.groups is None else same_group(cond.groups)
        h = self.io.embed(x_t) + self.pos_embed
        for k, block in enumerate(self.blocks, start=1):
            h = block(h, c, mask)
            collector.offer(f"block.{k}", Tokens(h, self.io.grid, self.io.prefix))
            if only_taps and collector.complete:
                return Output(taps=collector.found)
        shift, scale = self.final_modulation(c)
        pred, heads = self.io.unembed(modulate(h, shift, scale))
        return Output(pred, heads, collector.found)
