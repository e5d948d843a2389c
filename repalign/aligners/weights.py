"""Weights of an alignment term that change over a run: called with the number of finished steps."""

from __future__ import annotations


class LateDecay:
    """The weight stays at ``value`` for ``hold`` epochs after the first, then falls by a power of ten (SRA's code).

    weight = value * 10^(-max(e - hold, 0) / tenfold) at the 0-based epoch e = step // epoch. SRA at 256 px: hold 149,
    tenfold 1000; at 512 px: 99 and 800. The paper prints a constant; its code decays, because the norms of the hidden
    states grow.

    Args:
        value: weight at the beginning.
        hold: last 0-based epoch with that weight.
        tenfold: epochs in which it falls to a tenth.
        epoch: steps of an epoch.
    """

    def __init__(self, value: float, hold: int, tenfold: float, epoch: int) -> None:
        self.value = value
        self.hold = hold
        self.tenfold = tenfold
        self.epoch = epoch

    def __call__(self, step: int) -> float:
        late = max(step // self.epoch - self.hold, 0)
        return self.value * 10 ** (-late / self.tenfold)
