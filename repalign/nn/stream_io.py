"""Token ios of states with several streams (protocol ``TokenIO``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.nn.init import zero_
from repalign.nn.token_io import PatchIO
from repalign.state import State, StateShape, Streams


class PatchAndClassIO(nn.Module):
    """A latent as patches and a vector as one token before them (REG, arXiv:2507.01467, section 3.2).

    The vector's token is LayerNorm(W c_t + b), affine, eps 1e-6; its position is zero. Tokens return through the
    backbone's shared final norm and then a linear layer of each stream.

    Args:
        latent_shape: one stream [C, H, W] and one stream [E], by name.
        patch, dim: see :class:`repalign.nn.token_io.PatchIO`.
        variance_head: must be false, a class token has no variance.

    Raises:
        UserError: for other streams, or a variance head.
    """

    prefix = 1

    def __init__(self, latent_shape: StateShape, patch: int, dim: int, variance_head: bool = False) -> None:
        super().__init__()
        maps, vectors = _by_kind(latent_shape)
        if len(maps) != 1 or len(vectors) != 1:
            raise UserError(
                f"token_io: patches and a class token take one map and one vector, found {_shown(latent_shape)}; set "
                "streams=class_token"
            )
        if variance_head:
            raise UserError(
                "token_io and backbone.variance_head do not go together: a class token has no variance; set "
                "backbone.variance_head=false (and another objective than learned_variance)"
            )
        [(self.map_name, map_shape)], [(self.vector_name, (width,))] = maps.items(), vectors.items()
        self.patches = PatchIO(map_shape, patch, dim)
        self.grid = self.patches.grid
        self.vector_in = nn.Linear(width, dim)
        self.vector_norm = nn.LayerNorm(dim, eps=1e-6)
        self.vector_out = nn.Linear(dim, width)

    def positions(self) -> Float[Tensor, "1 n d"]:
        """Zero for the class token, sine-cosine for the patches."""
        patches = self.patches.positions()
        return torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1)

    def reset_parameters(self) -> None:
        """Those of the patches; zero output for the vector too."""
        self.patches.reset_parameters()
        zero_(self.vector_out)

    def embed(self, x_t: Streams) -> Float[Tensor, "b n d"]:
        """The class token, then the patches."""
        token = self.vector_norm(self.vector_in(x_t[self.vector_name]))
        return torch.cat([token.unsqueeze(1), self.patches.embed(x_t[self.map_name])], dim=1)

    def unembed(self, tokens: Float[Tensor, "b n d"]) -> tuple[State, Mapping[str, State]]:
        """Tokens to a prediction of both streams."""
        image, _ = self.patches.unembed(tokens[:, 1:])
        return Streams({self.map_name: image, self.vector_name: self.vector_out(tokens[:, 0])}), {}


class ChannelIO(nn.Module):
    """Maps of one size joined along their channels and cut into common patches (ReDi, arXiv:2504.16064: merged tokens).

    One linear embedding of the joined patch is the sum of an embedding of each stream, so the number of tokens is that
    of the latent alone.

    Args:
        latent_shape: streams [C_k, H, W] of equal H and W, by name.
        patch, dim, variance_head: see :class:`repalign.nn.token_io.PatchIO`.

    Raises:
        UserError: for a plain state, or streams that are no maps of one size.
    """

    prefix = 0

    def __init__(self, latent_shape: StateShape, patch: int, dim: int, variance_head: bool = False) -> None:
        super().__init__()
        shapes = _maps_of_one_size(latent_shape, "joined channels")
        self.channels = {name: shape[0] for name, shape in shapes.items()}
        height, width = next(iter(shapes.values()))[1:]
        self.patches = PatchIO((sum(self.channels.values()), height, width), patch, dim, variance_head)
        self.grid = self.patches.grid

    def positions(self) -> Float[Tensor, "1 n d"]:
        """Sine-cosine positions of the patches."""
        return self.patches.positions()

    def reset_parameters(self) -> None:
        """Those of the patches."""
        self.patches.reset_parameters()

    def embed(self, x_t: Streams) -> Float[Tensor, "b n d"]:
        """Joined patches to tokens."""
        return self.patches.embed(torch.cat([x_t[name] for name in self.channels], dim=1))

    def unembed(self, tokens: Float[Tensor, "b n d"]) -> tuple[State, Mapping[str, State]]:
        """Tokens to the prediction and the heads, each split into the streams again."""
        pred, heads = self.patches.unembed(tokens)
        return self._split(pred), {name: self._split(head) for name, head in heads.items()}

    def _split(self, joined: Tensor) -> Streams:
        parts = joined.split(list(self.channels.values()), dim=1)
        return Streams(dict(zip(self.channels, parts, strict=True)))


class SeparateIO(nn.Module):
    """Maps of one size, each with patches and an output layer of its own (ReDi's separate tokens).

    K streams are K times as many tokens. Those of the first stream (the latent) are the grid; the others' stand before
    it as prefix tokens, so that an aligner sees the latent's tokens alone. Every stream has the positions of the grid.

    Args:
        latent_shape: streams [C_k, H, W] of equal H and W, by name.
        patch, dim, variance_head: see :class:`repalign.nn.token_io.PatchIO`.

    Raises:
        UserError: for a plain state, or streams that are no maps of one size.
    """

    def __init__(self, latent_shape: StateShape, patch: int, dim: int, variance_head: bool = False) -> None:
        super().__init__()
        shapes = _maps_of_one_size(latent_shape, "separate tokens")
        # The latent's tokens come last.
        self.patches = nn.ModuleDict(
            {name: PatchIO(shape, patch, dim, variance_head) for name, shape in reversed(list(shapes.items()))}
        )
        self.order = list(shapes)
        self.grid = (shapes[self.order[0]][1] // patch, shapes[self.order[0]][2] // patch)
        self.prefix = (len(shapes) - 1) * self.grid[0] * self.grid[1]

    def _each(self) -> list[tuple[str, PatchIO]]:
        return [(name, part) for name, part in self.patches.items() if isinstance(part, PatchIO)]

    def positions(self) -> Float[Tensor, "1 n d"]:
        """Sine-cosine positions of the patches, for every stream."""
        return torch.cat([part.positions() for _, part in self._each()], dim=1)

    def reset_parameters(self) -> None:
        """Those of the patches of every stream."""
        for _, part in self._each():
            part.reset_parameters()

    def embed(self, x_t: Streams) -> Float[Tensor, "b n d"]:
        """Patches of every stream, the latent's last."""
        return torch.cat([part.embed(x_t[name]) for name, part in self._each()], dim=1)

    def unembed(self, tokens: Float[Tensor, "b n d"]) -> tuple[State, Mapping[str, State]]:
        """Tokens to the prediction and the heads of every stream."""
        by_stream = rearrange(tokens, "b (k n) d -> k b n d", k=len(self.order))
        found = {name: part.unembed(own) for (name, part), own in zip(self._each(), by_stream, strict=True)}
        heads = next(iter(found.values()))[1]
        return (
            Streams({name: found[name][0] for name in self.order}),
            {head: Streams({name: found[name][1][head] for name in self.order}) for head in heads},
        )


def _by_kind(shapes: StateShape) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Streams that are maps [C, H, W], and those that are vectors [E]."""
    if not isinstance(shapes, Mapping):
        return {}, {}
    return {n: s for n, s in shapes.items() if len(s) == 3}, {n: s for n, s in shapes.items() if len(s) == 1}


def _maps_of_one_size(shapes: StateShape, what: str) -> Mapping[str, tuple[int, ...]]:
    maps, _ = _by_kind(shapes)
    if not maps or len(maps) != len(shapes) or len({shape[1:] for shape in maps.values()}) != 1:
        raise UserError(
            f"token_io: {what} take several maps of one height and width, found {_shown(shapes)}; set "
            "streams=pca_features"
        )
    return maps


def _shown(shapes: StateShape) -> str:
    if not isinstance(shapes, Mapping):
        return f"one stream of {list(shapes)}"
    return ", ".join(f"{name} of {list(shape)}" for name, shape in shapes.items())
