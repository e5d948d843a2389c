"""Quality that can be measured without a learned network: sharpness, contrast, entropy, blocks of JPEG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.curation.steps import Candidates, Picture, Verdict, outside

# Of ITU-R BT.601, which JPEG uses.
_RED, _GREEN, _BLUE = 0.299, 0.587, 0.114
_BYTE = 1 / 255
FORMULAS = "quality 2"  # stands for them in fingerprints


def measures(picture: Picture) -> dict[str, float]:
    """Five numbers of a picture's luma y = .299 R + .587 G + .114 B in [0, 1], at its own size.

    * sharpness: standard deviation of the Laplacian y(i-1,j) + y(i+1,j) + y(i,j-1) + y(i,j+1) - 4 y(i,j).
    * contrast: standard deviation of y.
    * entropy: -sum p log2 p over the 256 values of the byte round(255 y), in [0, 8] bits.
    * blocking: (b + 1/255) / (a + 1/255) - 1, with b the mean absolute difference of neighbours across the borders of
      the 8 x 8 blocks that begin at the corner, a the mean over all other neighbours. About 0 without JPEG.
    * quality: (s / (s + .02) c / (c + .1))^(1/2) / (1 + max(0, blocking)), in [0, 1), of sharpness s and contrast c:
      which of two is better. Without entropy: JPEG's ringing raises it.

    None of them says whether a picture is beautiful. Sides below 3 pixels give 0 for what needs neighbours.
    """
    red, green, blue = picture.float() * _BYTE
    y = _RED * red + _GREEN * green + _BLUE * blue
    counts = torch.bincount((255 * y).round().long().flatten().clamp(0, 255), minlength=256).double()
    share = counts[counts > 0] / counts.sum()
    entropy = abs(float((share * share.log2()).sum()))
    sharpness, contrast, blocking = _laplacian(y), float(y.std(correction=0)), _blocking(y)
    score = (sharpness / (sharpness + 0.02) * contrast / (contrast + 0.1)) ** 0.5
    return {
        "sharpness": sharpness,
        "contrast": contrast,
        "entropy": entropy,
        "blocking": blocking,
        "quality": score / (1 + max(0.0, blocking)),
    }


def _laplacian(y: Float[Tensor, "h w"]) -> float:
    if min(y.shape) < 3:
        return 0.0
    middle = y[1:-1, 1:-1]
    return float((y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4 * middle).std(correction=0))


def _blocking(y: Float[Tensor, "h w"]) -> float:
    found = []
    for plane in (y, y.T):
        steps = (plane[1:] - plane[:-1]).abs().mean(1)  # step k lies between lines k and k + 1
        border = torch.arange(len(steps)) % 8 == 7
        if border.any() and not border.all():
            found.append(float((steps[border].mean() + _BYTE) / (steps[~border].mean() + _BYTE) - 1))
    return sum(found) / len(found) if found else 0.0


class QualityLimits:
    """Limits on what :func:`measures` gives; null for none. A picture at a limit stays.

    Args:
        sharpness, contrast, entropy, quality: least values; a flat picture has contrast and entropy 0.
        blocking: largest value.
    """

    fingerprint = FORMULAS

    def __init__(
        self,
        sharpness: float | None = None,
        contrast: float | None = None,
        entropy: float | None = None,
        blocking: float | None = None,
        quality: float | None = None,
    ) -> None:
        self.least = {"sharpness": sharpness, "contrast": contrast, "entropy": entropy, "quality": quality}
        self.most = {"blocking": blocking}

    def measure(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]:
        """The five numbers, float32 [B] each."""
        found = [measures(picture) for picture in pictures]
        return {name: torch.tensor([one[name] for one in found], dtype=torch.float32) for name in found[0]}

    def judge(self, candidates: Candidates) -> Verdict:
        """Pictures outside a limit; the first reason counts."""
        reasons: dict[int, str] = {}
        for name, least in self.least.items():
            reasons = outside(name, candidates.measured[name], least, None) | reasons
        for name, most in self.most.items():
            reasons = outside(name, candidates.measured[name], None, most) | reasons
        return Verdict(reasons)
