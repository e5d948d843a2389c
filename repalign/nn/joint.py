"""The joint block of MM-DiT: two streams with weights of their own that meet in one attention."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repalign.nn.attention import SelfAttention
from repalign.nn.blocks import MLP, Modulation, modulate, over_tokens
from repalign.nn.norm import RMSNorm


class StreamHalf(nn.Module):
    """What one stream of a joint block owns: modulation, projections of the attention, MLP.

    Args:
        dim: width D.
        heads: number of heads.
        mlp_ratio: hidden width of the MLP over D.
        qk_norm: RMS-normalise every head's queries and keys.
        dual: a second attention, within this stream alone, beside the joint one (SD3.5 medium, image stream).
        ends: the stream is read a last time and not written: a shift and a scale, no output layer, no MLP.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float, qk_norm: bool, dual: bool = False, ends: bool = False
    ) -> None:
        super().__init__()
        self.dual = dual
        self.modulation = Modulation(dim, 2 if ends else 9 if dual else 6)
        self.attention = SelfAttention(dim, heads, qk_norm, norm=RMSNorm, output=not ends)
        if dual:
            self.attention2 = SelfAttention(dim, heads, qk_norm, norm=RMSNorm)
        if not ends:
            self.mlp = MLP(dim, int(dim * mlp_ratio))

    def write(self, x: Tensor, mixed: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """The stream after the block: both attentions and the MLP added, each behind its gate.

        Both attentions read the same normalised input, whatever the order of the additions.
        """
        gate_a, shift_m, scale_m, gate_m = (over_tokens(v) for v in vectors[2:6])
        out = x + gate_a * self.attention.proj(mixed)
        if self.dual:
            shift_2, scale_2, gate_2 = vectors[6:]
            out = out + over_tokens(gate_2) * self.attention2(modulate(x, shift_2, scale_2))
        return out + gate_m * self.mlp(modulate(out, shift_m, scale_m))


class JointBlock(nn.Module):
    """Text and image tokens attend to both; everything else each stream does with its own weights (arXiv:2403.03206).

    softmax runs over [text, image]; the six modulation vectors come in the order shift, scale, gate of the attention,
    then of the MLP; those of the second attention follow.

    Args:
        dim, heads, mlp_ratio, qk_norm, dual: see :class:`StreamHalf`.
        last: the text stream ends here.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        dual: bool = False,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.last = last
        self.text = StreamHalf(dim, heads, mlp_ratio, qk_norm, ends=last)
        self.image = StreamHalf(dim, heads, mlp_ratio, qk_norm, dual)

    def forward(
        self, image: Float[Tensor, "b n d"], text: Float[Tensor, "b m d"], c: Float[Tensor, "b d"]
    ) -> tuple[Tensor, Tensor]:
        """Both streams after the block; where the text stream ends it comes back as it was."""
        halves = ((self.text, text), (self.image, image))
        vectors = [half.modulation(c) for half, _ in halves]
        heads = [
            half.attention.heads_of(modulate(x, shift, scale))
            for (half, x), (shift, scale, *_) in zip(halves, vectors, strict=True)
        ]
        mixed = self.image.attention.attend(*(torch.cat(both, 2) for both in zip(*heads, strict=True)))
        length = text.shape[1]
        image = self.image.write(image, mixed[:, length:], vectors[1])
        if not self.last:
            text = self.text.write(text, mixed[:, :length], vectors[0])
        return image, text
