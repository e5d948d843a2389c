"""Texts of any length: as the rows of an array, which a store keeps captions in, and read when they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import overload

import numpy as np


class LazyTexts(Sequence[str], ABC):
    """Texts that are read when they are asked for, one by one."""

    @abstractmethod
    def text(self, index: int) -> str:
        """One of them, 0 <= index < len."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)  # what ends a loop over a sequence
        return self.text(int(index))


class SomeTexts(LazyTexts):
    """Some of many texts, read when they are asked for.

    Args:
        texts: all of them.
        rows: the places of those that are wanted.
    """

    def __init__(self, texts: Sequence[str], rows: np.ndarray) -> None:
        self._texts, self._rows = texts, rows

    def __len__(self) -> int:
        return len(self._rows)

    def text(self, index: int) -> str:
        """One of them."""
        return self._texts[int(self._rows[index])]


def pack(texts: Sequence[str]) -> np.ndarray:
    """Texts as bytes, uint8 [8 B + length]: where each one ends (B times int64, little-endian), then UTF-8."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype="<i8")
    return np.frombuffer(ends.tobytes() + b"".join(encoded), dtype=np.uint8)


def unpack(packed: np.ndarray, count: int, row: int) -> str:
    """One of ``count`` texts that :func:`pack` joined."""
    ends = packed[: 8 * count].view("<i8")
    begin = 8 * count + (int(ends[row - 1]) if row else 0)
    return packed[begin : 8 * count + int(ends[row])].tobytes().decode()
