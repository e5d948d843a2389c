"""Texts of any length as the rows of an array: what a store keeps captions in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
