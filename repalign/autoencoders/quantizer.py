"""The codebook of a VQ autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """Latents on codes.

    Attributes:
        latent: [B, C, H, W], the nearest codes; its gradient passes straight through to what was quantised.
        loss: [B], how far encoder and codebook are from each other.
        indices: [B, H, W], the code at every position.
    """

    latent: Float[Tensor, "b c h w"]
    loss: Float[Tensor, " b"]
    indices: Int[Tensor, "b h w"]


class VectorQuantizer(nn.Module):
    """The nearest code in L2, with a straight-through gradient (van den Oord et al., arXiv:1711.00937).

    z_q = e_k, k = argmin_k |z - e_k|^2; passed on as z + sg(z_q - z); loss = mean (sg z_q - z)^2 + beta mean (z_q - sg
    z)^2 per sample. The paper has beta on the first term, which commits the encoder; the official code of LDM and its
    released models have it on the second, which moves the codes (``legacy``).

    Args:
        codes: number of codes K.
        dim: width of a code = channels of the latent.
        beta: weight of one of the two terms.
        legacy: beta on the codebook's term as in LDM's models (True), or on the encoder's as in the paper (False).
    """

    def __init__(self, codes: int, dim: int, beta: float = 0.25, legacy: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        self.beta = beta
        self.legacy = legacy

    def forward(self, z: Float[Tensor, "b c h w"]) -> Quantized:
        """Quantise every position; in float32 whatever the surroundings, because near codes differ little."""
        with torch.autocast(z.device.type, enabled=False):
            positions = z.float().permute(0, 2, 3, 1)
            codes = self.embedding.weight.float()
            with torch.no_grad():
                # |z|^2 is the same for all codes of a position, so it does not matter which is the nearest.
                distances = torch.addmm(codes.square().sum(1), positions.flatten(0, 2), codes.T, alpha=-2)
                indices = distances.argmin(1).reshape(positions.shape[:3])
            nearest = nn.functional.embedding(indices, codes).permute(0, 3, 1, 2)
            z = z.float()
            to_encoder = (nearest.detach() - z).square().flatten(1).mean(1)
            to_codes = (nearest - z.detach()).square().flatten(1).mean(1)
            loss = to_encoder + self.beta * to_codes if self.legacy else self.beta * to_encoder + to_codes
            return Quantized(z + (nearest - z).detach(), loss, indices)

    def usage(self, indices: Int[Tensor, "*positions"]) -> dict[str, Tensor]:
        """How evenly a set of indices uses the codebook.

        Returns:
            ``perplexity`` = exp(-sum_k p_k log(p_k + 1e-10)) for code frequencies p (K when all K codes are equally
            frequent), and ``codes_used``, the number of codes that occur.
        """
        counts = torch.bincount(indices.flatten(), minlength=self.embedding.num_embeddings)
        frequency = counts / counts.sum()
        perplexity = (-(frequency * (frequency + 1e-10).log()).sum()).exp()
        return {"perplexity": perplexity, "codes_used": (counts > 0).sum()}
