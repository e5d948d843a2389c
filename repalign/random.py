"""Counter-based randomness: every number is a pure function of (seed, serial number of the sample, name).

The serial number counts samples over the whole run: serial = step * global_batch + position in the global batch. So the
noise, the times and the dropped labels of a sample depend neither on the number of ranks and workers nor on what was
drawn before, and a resumed run needs no stored generator state. Philox 4x64 (Salmon et al., SC 2011) through NumPy,
whose bit streams are stable across platforms; drawn on the CPU, then moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from repalign.state import State, Streams

_WORD = 2**64


def _words(name: str) -> int:
    """64 bits that stand for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class SampleRandom:
    """One independent random stream per sample and per name.

    Attributes:
        seed: the run's seed.
        serials: serial number of each sample of the batch.
        device: where the tensors are put.
        stage: a further counter, the step of a sampler for instance; see :meth:`at`.
    """

    seed: int
    serials: Sequence[int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stage: int = 0

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.serials)

    def at(self, stage: int) -> SampleRandom:
        """The streams of another stage (step of a sampler), independent of this one's."""
        return replace(self, stage=stage)

    def uniform(self, name: str) -> Tensor:
        """U[0, 1) in float32, shape [B]."""
        values = np.array([g.random(dtype=np.float32) for g in self._generators(name)], dtype=np.float32)
        return on_device(values, self.device)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Uniform integers in [low, high), int64, shape [B]."""
        values = np.array([g.integers(low, high) for g in self._generators(name)], dtype=np.int64)
        return on_device(values, self.device)

    def normal(self, name: str, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal, shape [B, *shape]; drawn in float32 unless ``dtype`` is float64."""
        numpy_dtype = np.float64 if dtype == torch.float64 else np.float32
        rows = [generator.standard_normal(tuple(shape), dtype=numpy_dtype) for generator in self._generators(name)]
        return on_device(np.array(rows, dtype=numpy_dtype).reshape(-1, *shape), self.device).to(dtype)

    def normal_like(self, name: str, state: State) -> State:
        """Standard normal shaped like a state; each stream has its own name."""
        if isinstance(state, Streams):
            return Streams({k: self.normal(f"{name}/{k}", v.shape[1:], v.dtype) for k, v in state.items()})
        return self.normal(name, state.shape[1:], state.dtype)

    def _generators(self, name: str) -> list[np.random.Generator]:
        key = np.array([self.seed % _WORD, _words(name)], dtype=np.uint64)
        return [
            np.random.Generator(
                np.random.Philox(key=key, counter=np.array([0, int(s) % _WORD, self.stage, 0], dtype=np.uint64))
            )
            for s in self.serials
        ]


def on_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """What lies on the host as a tensor there, without waiting: a GPU copies from pinned memory in its own time."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return (
        tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)
    )
