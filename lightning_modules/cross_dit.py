"""Cross-DiT."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.backbones.clocks import unwrapped
from repalign.backbones.cross_dit import CrossDiT as CrossDiTBackbone


class CrossDiT(Generative):
    """DiT that attends to text (PixArt-alpha, arXiv:2310.00426; the CrossDiT baseline of SD3, arXiv:2403.03206).

    The network is DiT with a cross-attention in every block; path, prediction and times are free: the recipe trains a
    rectified flow with logit-normal times as SD3's comparison does, PixArt-alpha itself predicts the noise.
    """

    def contract(self) -> None:
        kind = type(unwrapped(self.backbone)).__name__
        self.require(
            isinstance(unwrapped(self.backbone), CrossDiTBackbone),
            f"needs a Cross-DiT; set backbone=cross_dit_xl (found {kind})",
        )
        self.require("caption" in self.conditioner.reads, "needs captions; set conditioner=text and text_encoder=...")
