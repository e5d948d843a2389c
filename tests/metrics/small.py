"""A feature network that is small, and still has correlated features."""

import torch
from torch import nn

from repalign.metrics.drawn import Drawn
from repalign.metrics.features import Features


class SmallNetwork(nn.Module):
    def __init__(self, dim: int = 12, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(dim, 48, generator=generator), requires_grad=False)
        self.head = nn.Parameter(3 * torch.randn(classes, dim, generator=generator), requires_grad=False)
        self.fingerprint = f"small-{dim}-{classes}-{seed}"
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        cells = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        features = torch.tanh(cells @ self.weight.T)
        return features, features @ self.head.T


def pictures(count: int, seed: int, shift: float = 0.0, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(count, 3, 1, 1, generator=generator) + 0.4 * torch.randn(
        count, 3, size, size, generator=generator
    )
    return (base + shift).clamp(0, 1)


def drawn_from(features: torch.Tensor | None = None, logits: torch.Tensor | None = None, groups: int = 1) -> Drawn:
    """Statistics of given rows."""
    pooled = torch.zeros(len(logits), 2) if features is None else features
    needs = {"pooled", "features"} if logits is None else {"pooled", "features", "logits"}
    drawn = Drawn(needs, groups)
    drawn.add(torch.arange(len(pooled)), Features(pooled, logits))
    return drawn
