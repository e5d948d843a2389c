"""How well pictures show what their captions say."""

from __future__ import annotations

import torch.nn.functional as F

from repalign.metrics.drawn import Drawn
from repalign.metrics.reference import Reference


class ClipScore:
    """Mean over the pictures of s cos(E_image(x), E_text(c)); higher is better.

    Three forms are printed. The cosine itself (``scale=1``): SD3 (arXiv:2403.03206, table 2: about 0.25),
    T2I-CompBench. ``scale=100, clamp=true``: 100 max(cos, 0), torchmetrics and many papers. ``scale=2.5, clamp=true``:
    CLIPScore as Hessel et al. define it (EMNLP 2021, arXiv:2104.08718), who also begin each caption with "A photo
    depicts", which is left to the captions here. Numbers of different networks cannot be compared: ViT-L/14 at 224 px
    in SD3, ViT-B/32 in Hessel et al. and T2I-CompBench. In float64.

    Args:
        scale: s.
        clamp: negative cosines count as 0.
    """

    needs = frozenset({"features", "text"})
    needs_reference: frozenset[str] = frozenset()

    def __init__(self, scale: float = 1.0, clamp: bool = False) -> None:
        self.scale, self.clamp = scale, clamp

    def __call__(self, drawn: Drawn, reference: Reference | None = None) -> tuple[float, None]:
        """The mean, no spread."""
        cosine = F.cosine_similarity(drawn.rows("features").double(), drawn.rows("text").double())
        return self.scale * float((cosine.clamp(min=0) if self.clamp else cosine).mean()), None
