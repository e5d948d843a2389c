"""The network that tells pictures from reconstructions."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from repalign.autoencoders.weights import load_exactly, read_weights
from repalign.nn.batch_norm import BatchNorm2d


class PatchDiscriminator(nn.Module):
    """PatchGAN: one logit per overlapping patch (Isola et al., arXiv:1611.07004, appendix 6.1.2).

    4x4 convolutions, padding 1, LeakyReLU 0.2: one of stride 2 to ``width`` channels; ``layers`` - 1 more of stride 2,
    each doubling the channels; one of stride 1 that doubles them once more (8 ``width`` at most); one of stride 1 to a
    logit. Batch normalisation behind all but the first and the last, which have biases instead. Convolutions begin as
    N(0, 0.02^2), the scales of batch norms as N(1, 0.02^2).

    In LDM and REPA-E it stays in training mode throughout: batch norms use the statistics of the real or of the
    reconstructed half batch of all processes, and their running statistics are never used. (In the official codes each
    process has its own; so many processes would train otherwise than one.) Keys are those of the official code
    (``main.0.weight``, ...).

    Args:
        width: channels behind the first convolution.
        layers: convolutions of stride 2; the patch of a logit has a side of 16, 34, 70 pixels for 1, 2, 3 of them.
        weights: path of a weights file, or 'random'.

    Raises:
        UserError: when the file is missing or of another architecture.
    """

    def __init__(self, width: int = 64, layers: int = 3, weights: str | Path = "random") -> None:
        super().__init__()
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for place, (dim_in, dim) in enumerate(zip(widths[:-1], widths[1:], strict=True), 1):
            stride = 2 if place < layers else 1
            blocks += [nn.Conv2d(dim_in, dim, 4, stride, padding=1, bias=False), BatchNorm2d(dim), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        if weights != "random":
            load_exactly(self, read_weights(weights)[0], weights)

    def forward(self, signed: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        """Pictures in [-1, 1] -> logits, higher for what looks real."""
        return self.main(signed)
