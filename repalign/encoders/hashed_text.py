"""A text encoder without weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repalign.random import SampleRandom
from repalign.state import TextStates, TokenSpec


class HashedTextEncoder:
    """A fixed random unit-variance vector for every word: for tests and ``debug=tiny``; words alike have nothing alike.

    Captions are split at white space, padded with zeros and cut to ``length`` words. The vector is a function of the
    word and the width alone.

    Args:
        dim: width D.
        length: N.
    """

    def __init__(self, dim: int, length: int) -> None:
        self.length = length
        self.spec = TokenSpec(dim)
        self.fingerprint = f"hashed-text-{dim}-{length}"

    def __call__(self, captions: Sequence[str]) -> TextStates:
        """States [B, N, D] and mask [B, N]; on the CPU."""
        rows = [caption.lower().split()[: self.length] for caption in captions]
        data = torch.zeros(len(rows), self.length, self.spec.dim)
        mask = torch.zeros(len(rows), self.length, dtype=torch.bool)
        for row, words in enumerate(rows):
            for place, word in enumerate(words):
                data[row, place] = self._vector(word)
                mask[row, place] = True
        return TextStates(data, mask)

    def _vector(self, word: str) -> Tensor:
        return SampleRandom(0, [0]).normal(word, (self.spec.dim,))[0]
