"""Records that travel between the parts of a training or sampling step.

Letters, fixed everywhere: B batch, C channels, H W size, N tokens, D width, K times or candidates, P pooled width.
Time: t = 0 is data, t = 1 is noise; x_t = alpha_t x_0 + sigma_t eps; velocity v = dx_t/dt.
Images are [B, 3, H, W] in [0, 1] at every border between parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repalign.streams import (
    LATENT as LATENT,
)
from repalign.streams import (
    State as State,
)
from repalign.streams import (
    StateShape as StateShape,
)
from repalign.streams import (
    Streams as Streams,
)
from repalign.streams import (
    concatenate as concatenate,
)
from repalign.streams import (
    expand as expand,
)
from repalign.streams import (
    latent_of as latent_of,
)
from repalign.streams import (
    leading as leading,
)
from repalign.streams import (
    map_state as map_state,
)
from repalign.streams import (
    mean_per_sample as mean_per_sample,
)
from repalign.streams import (
    stream_by_stream as stream_by_stream,
)


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
class TextStates:
    """What a text encoder says of captions.

    Attributes:
        data: [B, N, D] token states, padding included.
        mask: [B, N], true where a token is no padding.
        pooled: [B, P] one vector per caption, or None.
    """

    data: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    pooled: Float[Tensor, "b p"] | None = None


@dataclass(frozen=True)
class Cond:
    """Conditions of a batch: class labels, text tokens, a pooled vector, a map beside the latent; each may be absent.

    ``groups`` gives every grid token the number of its group, when tokens of different groups must not see each other.
    ``text_mask`` is true at text tokens that may be seen; ``size`` holds height, width and aspect ratio of the picture;
    ``spatial`` is a map of the latent's size that joins its channels (a semantic map, a masked or a small picture).
    ``skip`` numbers blocks that a call passes over, 1-based: the weaker network of skip-layer guidance.
    """

    label: Int[Tensor, " b"] | None = None
    text: Tokens | None = None
    pooled: Float[Tensor, "b p"] | None = None
    groups: Int[Tensor, "b n"] | None = None
    text_mask: Bool[Tensor, "b n"] | None = None
    size: Float[Tensor, "b 3"] | None = None
    spatial: Float[Tensor, "b c h w"] | None = None
    skip: tuple[int, ...] = ()

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """Apply ``fn`` to every tensor present (to slice, move or repeat the batch)."""
        return self._pair(self, lambda own, same: fn(own))

    def where(self, drop: Bool[Tensor, " b"], null: Cond) -> Cond:
        """Replace the dropped rows by the null condition."""

        def pick(kept: Tensor, other: Tensor) -> Tensor:
            return torch.where(drop.reshape(-1, *[1] * (kept.ndim - 1)), other, kept)

        return self._pair(null, pick)

    def completed(self, other: Cond) -> Cond:
        """What is absent here taken from another: a null condition keeps what has no null (the map of inpainting)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Cond(**{name: theirs if own is None else own for name, (own, theirs) in pairs.items()})

    def concatenate(self, other: Cond) -> Cond:
        """Join two conditions along the batch."""
        return self._pair(other, lambda a, b: torch.cat([a, b]))

    def _pair(self, other: Cond, fn: Callable[[Tensor, Tensor], Tensor]) -> Cond:
        """``fn`` of every tensor that both have; ``skip`` is this one's."""

        def both(a: Any, b: Any) -> Any:
            if a is None or b is None:
                return None
            return a.with_data(fn(a.data, b.data)) if isinstance(a, Tokens) else fn(a, b)

        names = [field.name for field in fields(self) if field.name != "skip"]
        return replace(self, **{name: both(getattr(self, name), getattr(other, name)) for name in names})


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
        groups: the group of every token, 0 .. K - 1, when tokens have one of K times each; None otherwise.
    """

    t: Tensor | None = None
    eps: State | None = None
    drop: Mapping[str, Bool[Tensor, " b"]] = field(default_factory=dict)
    groups: Int[Tensor, "b n"] | None = None


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
    """What an objective returns: losses [B] by name, the backbone's output, the path sample (None without a path).

    ``figures`` [B] by name are for the journal alone: nothing is minimised by them.
    """

    losses: Mapping[str, Float[Tensor, " b"]]
    output: Output
    sample: PathSample | None = None
    figures: Mapping[str, Float[Tensor, " b"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Losses:
    """The total to differentiate and every term's batch mean, by name."""

    total: Tensor
    terms: Mapping[str, Tensor]
