"""Records that travel between the parts of a training or sampling step.

Letters, fixed everywhere: B batch, C channels, H W size, N tokens, D width, K times or candidates, P pooled width.
Time: t = 0 is data, t = 1 is noise; x_t = alpha_t x_0 + sigma_t eps; velocity v = dx_t/dt.
Images are [B, 3, H, W] in [0, 1] at every border between parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
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
    """Shape a per-sample coefficient [B] (or a scalar) so that it multiplies a state of [B, ...] entries."""
    if coefficient.ndim == 0:
        return map_state(lambda x: coefficient.to(x), state)
    return map_state(lambda x: coefficient.to(x).reshape(-1, *[1] * (x.ndim - 1)), state)


def concatenate(first: State, second: State) -> State:
    """Join two states of the same streams along the batch."""
    if isinstance(first, Streams) and isinstance(second, Streams):
        return Streams({k: torch.cat([v, second[k]]) for k, v in first.items()})
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    return torch.cat([first, second])


def mean_per_sample(state: State) -> State:
    """Mean over everything but the batch: [B, ...] -> [B], stream by stream."""
    return map_state(lambda x: x.flatten(1).mean(1), state)


@dataclass(frozen=True)
class Tokens:
    """A sequence of hidden vectors with what is known of its layout.

    Attributes:
        data: [B, prefix + N, D].
        grid: (h, w) with h * w = N, row-major; None when the sequence is no grid.
        prefix: number of class or register tokens before the grid.
    """

    data: Float[Tensor, "b n d"]
    grid: tuple[int, int] | None = None
    prefix: int = 0

    @property
    def patches(self) -> Tokens:
        """The grid tokens alone, prefix tokens dropped."""
        return Tokens(self.data[:, self.prefix :], self.grid)

    def with_data(self, data: Tensor) -> Tokens:
        """The same layout around other vectors."""
        return replace(self, data=data)

    def resize(self, grid: tuple[int, int]) -> Tokens:
        """Grid tokens resampled to another grid (area when it shrinks, bilinear when it grows); prefix tokens stay.

        Raises:
            ValueError: when the sequence has no grid.
        """
        if self.grid == grid:
            return self
        if self.grid is None:
            raise ValueError("tokens without a grid cannot be resized; the tap or encoder gives a plain sequence")
        head, body = self.data[:, : self.prefix], self.data[:, self.prefix :]
        image = rearrange(body, "b (h w) d -> b d h w", h=self.grid[0], w=self.grid[1])
        if grid[0] <= self.grid[0] and grid[1] <= self.grid[1]:
            image = F.adaptive_avg_pool2d(image, grid)
        else:
            image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
        return Tokens(torch.cat([head, rearrange(image, "b d h w -> b (h w) d")], 1), grid, self.prefix)


@dataclass(frozen=True)
class TokenSpec:
    """The layout of a tap or of an encoder's output: width, grid and number of prefix tokens."""

    dim: int
    grid: tuple[int, int] | None = None
    prefix: int = 0


@dataclass(frozen=True)
class Cond:
    """Conditions of a batch: class labels, text tokens, a pooled vector; each may be absent."""

    label: Int[Tensor, " b"] | None = None
    text: Tokens | None = None
    pooled: Float[Tensor, "b p"] | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """Apply ``fn`` to every tensor present (to slice, move or repeat the batch)."""
        text = None if self.text is None else self.text.with_data(fn(self.text.data))
        return Cond(
            None if self.label is None else fn(self.label), text, None if self.pooled is None else fn(self.pooled)
        )

    def where(self, drop: Bool[Tensor, " b"], null: Cond) -> Cond:
        """Replace the dropped rows by the null condition."""

        def pick(kept: Tensor, other: Tensor) -> Tensor:
            return torch.where(drop.reshape(-1, *[1] * (kept.ndim - 1)), other, kept)

        return self._pair(null, pick)

    def concatenate(self, other: Cond) -> Cond:
        """Join two conditions along the batch."""
        return self._pair(other, lambda a, b: torch.cat([a, b]))

    def _pair(self, other: Cond, fn: Callable[[Tensor, Tensor], Tensor]) -> Cond:
        def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else fn(a, b)

        text = None
        if self.text is not None and other.text is not None:
            text = self.text.with_data(fn(self.text.data, other.text.data))
        return Cond(both(self.label, other.label), text, both(self.pooled, other.pooled))


@dataclass(frozen=True)
class Gaussian:
    """A diagonal Gaussian over a latent: what an autoencoder's encoder returns and what the latent cache stores.

    Attributes:
        mean: [B, C, H, W].
        std: [B, C, H, W] standard deviation (not its logarithm), or None for a deterministic encoder.
    """

    mean: Tensor
    std: Tensor | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """A draw: mean + std * noise."""
        return self.mean if self.std is None else self.mean + self.std * noise


@dataclass(frozen=True)
class Coefficients:
    """alpha_t, sigma_t and their time derivatives, each [B] or a scalar."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


@dataclass(frozen=True)
class Draw:
    """Everything random in one training step, made once and outside the backbone.

    Attributes:
        t: times [B] or [B, K] in [0, 1]; None for objectives without a path.
        eps: noise shaped like the state; None for objectives without a path.
        drop: which samples lose which condition or stream, name -> bool [B].
    """

    t: Tensor | None = None
    eps: State | None = None
    drop: Mapping[str, Bool[Tensor, " b"]] = field(default_factory=dict)


@dataclass(frozen=True)
class PathSample:
    """A point on the path between data and noise: x_t = alpha_t x_0 + sigma_t eps."""

    x_t: State
    t: Tensor
    x_0: State
    eps: State
    coefficients: Coefficients


@dataclass(frozen=True)
class Output:
    """What a backbone returns.

    Attributes:
        pred: the prediction, shaped like the state; None after ``only_taps``.
        heads: further outputs by name (``variance``, ``velocity.2``, ...).
        taps: the hidden states that were asked for, by name.
        carry: what the backbone wants back at the next call (encoder state, key-value cache); None otherwise.
    """

    pred: State | None = None
    heads: Mapping[str, State] = field(default_factory=dict)
    taps: Mapping[str, Tokens] = field(default_factory=dict)
    carry: Any = None


@dataclass(frozen=True)
class Step:
    """What an objective returns: losses [B] by name, the backbone's output, the path sample (None without a path)."""

    losses: Mapping[str, Float[Tensor, " b"]]
    output: Output
    sample: PathSample | None = None
