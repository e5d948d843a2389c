"""Mean and standard deviation of latents per channel, added up shard by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from repalign.folders import write_atomically

STATISTICS = "statistics.safetensors"

_CHUNK = 32  # rows turned into float64 at a time


def sums_of(moments: np.ndarray) -> dict[str, Any]:
    """What :func:`statistics_of` needs of a shard: number of values per channel, sum of mu, sum of mu^2 + s^2.

    Args:
        moments: as stored, [B, 1, C, ...] (mu) or [B, 2, C, ...] (mu and standard deviation s).
    """
    size = int(np.prod(moments.shape[3:]))
    total = squares = np.zeros(moments.shape[2])
    for first in range(0, len(moments), _CHUNK):
        # PyTorch converts half precision many times faster; NumPy adds up in one thread, so in one order.
        values = (
            torch.from_numpy(moments[first : first + _CHUNK]).double().numpy().reshape(-1, *moments.shape[1:3], size)
        )
        total = total + values[:, 0].sum((0, 2))
        squares = squares + np.einsum("nkcx,nkcx->c", values, values)
    return {"count": moments[:, 0, 0].size, "mean": total.tolist(), "square": squares.tolist()}


def statistics_of(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of draws from posteriors N(mu, s^2) over rows and positions, from the sums of all shards.

    mean_c = E[mu], std_c^2 = E[mu^2 + s^2] - mean_c^2, in float64; ``count`` values per channel.
    """
    count = sum(part["count"] for part in sums)
    total, squares = np.sum([part["mean"] for part in sums], axis=0), np.sum([part["square"] for part in sums], axis=0)
    mean = total / count
    # A channel that never changes gives a difference around zero.
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return {"count": count, "mean": mean.tolist(), "std": std.tolist()}


def write_statistics(folder: Path, statistics: Mapping[str, Any]) -> Path:
    """Write ``statistics.safetensors`` with float32 tensors ``mean`` and ``std`` [C]: a latent norm reads it."""
    tensors = {name: torch.tensor(statistics[name], dtype=torch.float32) for name in ("mean", "std")}
    path = folder / STATISTICS
    write_atomically(path, lambda file: file.write(save(tensors)))
    return path
