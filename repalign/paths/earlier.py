"""Less noisy times than a step's own, for a teacher that sees more than its student (SRA, arXiv:2505.02831)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repalign.protocols import Randomness
from repalign.state import Draw


class LessNoisy:
    """t' = max(t - width U[0, 1), 0), drawn for each sample from the stream ``t/teacher``.

    Where branches have times of their own t is the first one's: the input's.

    Args:
        width: largest difference (SRA on SiT: 0.2).
    """

    times = ("sample", "branch")

    def __init__(self, width: float) -> None:
        self.width = width

    def __call__(self, draw: Draw, random: Randomness) -> Float[Tensor, " b"]:
        assert draw.t is not None, "an earlier time needs an objective with times"
        t = draw.t if draw.t.ndim == 1 else draw.t[:, 0]
        return (t - self.width * random.uniform("t/teacher")).clamp(0, 1)


class LessNoisySteps:
    """Step k' = max(k - j, 1) of a discrete chain, j uniform in 0 .. width - 1; as house time (k' + 1) / steps.

    SRA's code for DiT clamps to step 1, not 0, so the teacher is one step noisier than a student at step 0.

    Args:
        width: number of differences (SRA on DiT: 200).
        steps: length of the chain.
    """

    times = ("sample",)

    def __init__(self, width: int, steps: int = 1000) -> None:
        self.width = width
        self.steps = steps

    def __call__(self, draw: Draw, random: Randomness) -> Float[Tensor, " b"]:
        assert draw.t is not None, "an earlier time needs an objective with times"
        step = (draw.t * self.steps).round() - 1
        earlier = (step - random.integers("t/teacher", 0, self.width)).clamp(1, self.steps - 1)
        return (earlier + 1) / self.steps


class LessNoisyGroups:
    """:class:`LessNoisy` where tokens have the time of their group: one difference for each group, [B, N] in all.

    Args:
        width: largest difference (0.2).
    """

    times = ("group",)

    def __init__(self, width: float) -> None:
        self.width = width

    def __call__(self, draw: Draw, random: Randomness) -> Float[Tensor, "b n"]:
        assert draw.t is not None and draw.groups is not None, "needs an objective whose tokens have groups"
        gaps = torch.stack([random.at(k).uniform("t/teacher") for k in range(draw.t.shape[1])], 1)
        return (draw.t - self.width * gaps).clamp(0, 1).gather(1, draw.groups)
