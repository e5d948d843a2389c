"""LayerSync."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.aligners.self_target import SelfTarget


class LayerSync(Generative):
    """Self-aligning intermediate layers (Haghighi et al., arXiv:2510.12581).

    loss = denoising - lambda mean_n cos(z_k(x_t, t, y)_n, sg z_k'(x_t, t, y)_n) over token pairs of a shallow layer k
    and a deeper one k' of the same pass, lambda 0.2. No head, no teacher, no further pass: at sampling the network is
    the base's. Several pairs are several aligners, and their terms add up; the official code counts the last pair
    alone.
    """

    def contract(self) -> None:
        pairs = {name: a for name, a in self.aligners.items() if isinstance(a.target, SelfTarget)}
        self.require(bool(pairs), "needs an aligner with a layer as target; set aligner=layer_sync")
        for name, aligner in pairs.items():
            self.require(
                aligner.tap != aligner.target.tap,
                f"aligners.{name}: tap and target are both '{aligner.tap}', whose cosine is 1; choose two layers",
            )
