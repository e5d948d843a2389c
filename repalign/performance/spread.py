"""A number with its spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median, tenth and ninetieth percentile of repeated measurements."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one measurement or more."""
        low, middle, high = np.percentile(np.asarray(values, dtype=np.float64), [10, 50, 90])
        return cls(float(middle), float(low), float(high))

    def inverse(self, of: float = 1.0) -> Spread:
        """``of`` divided by it: images per second from seconds per step."""
        return Spread(of / self.median, of / self.p90, of / self.p10)

    def numbers(self) -> dict[str, float]:
        """As a mapping, for a file."""
        return asdict(self)
