"""How far a score would move with other pictures of the same model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from repalign.metrics.drawn import Drawn

NORMAL_95 = 1.96  # quantile of the standard normal


def half_width(score: Callable[[Drawn], float], drawn: Drawn, draws: int, seed: int = 0) -> float:
    """Half the width of a 95 % interval, by the subset bootstrap: scores of random halves of the generated pictures.

    A half that is drawn without replacement varies as much as the whole does between independent sets: its variance is
    (1 - 1/2) / (n/2) = 1/n times that of one picture. So the deviation of the score over halves is used as it is,
    around the score of the whole: the bias that a Frechet distance has at n/2 pictures moves all halves alike and
    drops out. Halves are unions of groups of pictures (serial number modulo the number of groups), whose moments add
    up. Politis and Romano, Annals of Statistics 1994; covers the sampling of the generated pictures, not of the
    reference and not of the training.

    Args:
        score: of a part of the pictures.
        drawn: statistics in an even number of groups.
        draws: number of halves.
        seed: of the choice of halves.
    """
    assert drawn.groups > 1 and drawn.groups % 2 == 0, "halves need an even number of groups"
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(draws):
        chosen = torch.randperm(drawn.groups, generator=generator)[: drawn.groups // 2]
        values.append(score(drawn.part(chosen.tolist())))
    return NORMAL_95 * float(torch.tensor(values, dtype=torch.float64).std())
