"""States of one or several named streams: they add and scale alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Streams(Mapping[str, Tensor]):
    """Several named tensors that add and scale like one: ``x + dt * v`` reads the same for REG, ReDi and SiT.

    Every entry is [B, ...]. Arithmetic is entry-wise between two ``Streams`` of the same names, and broadcasts a
    number, or a [B]-shaped coefficient through :func:`expand`.

    Raises:
        KeyError: when two ``Streams`` of different names meet.
    """

    def __init__(self, entries: Mapping[str, Tensor] | None = None, **named: Tensor) -> None:
        self._entries: dict[str, Tensor] = {**(entries or {}), **named}

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return "Streams(" + ", ".join(f"{k}={list(v.shape)}" for k, v in self._entries.items()) + ")"

    def map(self, fn: Callable[[Tensor], Tensor]) -> Streams:
        """Apply ``fn`` to every entry."""
        return Streams({k: fn(v) for k, v in self._entries.items()})

    def _zip(self, other: Any, fn: Callable[[Any, Any], Tensor]) -> Streams:
        if isinstance(other, Streams):
            if set(other) != set(self):
                raise KeyError(f"streams differ: {sorted(self)} against {sorted(other)}")
            return Streams({k: fn(v, other[k]) for k, v in self._entries.items()})
        return Streams({k: fn(v, other) for k, v in self._entries.items()})

    def __add__(self, other: Any) -> Streams:
        return self._zip(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Streams:
        return self._zip(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> Streams:
        return self._zip(other, lambda a, b: a * b)

    def __truediv__(self, other: Any) -> Streams:
        return self._zip(other, lambda a, b: a / b)

    def __rsub__(self, other: Any) -> Streams:
        return self._zip(other, lambda a, b: b - a)

    def __neg__(self) -> Streams:
        return self.map(torch.neg)

    __radd__ = __add__
    __rmul__ = __mul__


State = Tensor | Streams
# (C, H, W) of a plain state, or the shape of each stream by name; without the batch.
StateShape = tuple[int, ...] | Mapping[str, tuple[int, ...]]
LATENT = "latent"  # the stream that an autoencoder decodes


def map_state(fn: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply ``fn`` to the tensor, or to each stream."""
    return state.map(fn) if isinstance(state, Streams) else fn(state)


def leading(state: State) -> Tensor:
    """The first tensor of a state: for its batch size, device and dtype."""
    return next(iter(state.values())) if isinstance(state, Streams) else state


def latent_of(state: State) -> Tensor:
    """What an autoencoder decodes: the plain state, or its stream ``latent``."""
    return state[LATENT] if isinstance(state, Streams) else state


def stream_by_stream(*states: State) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of several states of the same streams, by stream; those of plain states under the empty name."""
    named = [state if isinstance(state, Streams) else Streams({"": state}) for state in states]
    return {name: tuple(state[name] for state in named) for name in named[0]}


def expand(coefficient: Tensor, state: State) -> State:
    """Shape a per-sample coefficient [B] (or a scalar) so that it multiplies a state of [B, ...] entries.

    A coefficient that already has the state's number of dimensions ([B, 1, H, W] for an image) stays as it is.
    """
    if coefficient.ndim == 0:
        return map_state(lambda x: coefficient.to(x), state)

    def shape(x: Tensor) -> Tensor:
        return (
            coefficient.to(x) if coefficient.ndim == x.ndim > 1 else coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1))
        )

    return map_state(shape, state)


def concatenate(first: State, second: State) -> State:
    """Join two states of the same streams along the batch."""
    if isinstance(first, Streams) and isinstance(second, Streams):
        return Streams({k: torch.cat([v, second[k]]) for k, v in first.items()})
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])


def mean_per_sample(state: State) -> State:
    """Mean over everything but the batch: [B, ...] -> [B], stream by stream."""
    return map_state(lambda x: x.flatten(1).mean(1), state)
