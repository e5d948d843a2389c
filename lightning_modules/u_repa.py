"""U-REPA."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.aligners.manifold import BatchManifold, IntraManifold, PooledManifold
from repalign.aligners.targets import EncoderTarget

MANIFOLDS = (IntraManifold, PooledManifold, BatchManifold)


class URepa(Generative):
    """Representation alignment for diffusion U-Nets (Tian et al., NeurIPS 2025, arXiv:2503.18414).

    loss = denoising + lambda (L_token + w L_manifold), lambda 0.5, w 3: REPA at the end of the middle stage of a
    U-shaped network. h = resample(MLP(z_mid)) on the encoder's grid, L_token = -mean cos(h_n, f_n), L_manifold = mean
    square of the difference of the matrices of cosines between tokens. No official code was at hand: names and formulas
    are the paper's as far as known, sizes and the pairs of the manifold loss are this project's.
    """

    def contract(self) -> None:
        encoded = [a for a in self.aligners.values() if isinstance(a.target, EncoderTarget) and a.resize == "student"]
        self.require(
            bool(encoded),
            "needs an aligner with an encoder target whose head comes before the resampling; set aligner=u_repa",
        )
        related = [a for a in encoded if any(isinstance(s, MANIFOLDS) for _, s in a.similarities)]
        self.require(bool(related), "needs a manifold loss among its similarities; set aligner=u_repa")
