"""Layers that one code keeps in one matrix and another in several: queries, keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from repalign.checkpoints.keys import StateDict
from repalign.errors import UserError

# House pattern -> official patterns, whose rows lie one below the other in the house's matrix. ``#`` is a block number.
Groups = Mapping[str, Sequence[str]]


def fuse(official: StateDict, groups: Groups) -> dict[str, Tensor]:
    """The state dict with every group's matrices joined, under the house's key; other keys as they are.

    Raises:
        UserError: when a part of a group is missing.
    """
    parts = {
        part: (house, place) for house, names in groups.items() for place, name in enumerate(names) for part in [name]
    }
    found: dict[str, dict[int, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    for key, value in official.items():
        for part, (house, place) in parts.items():
            match = re.match(re.escape(part).replace(r"\#", r"(\d+)"), key)
            if match:
                target = _numbered(house, match) + key[match.end() :]
                found.setdefault(target, {})[place] = value
                sizes[target] = len(groups[house])
                break
        else:
            rest[key] = value
    for key, pieces in found.items():
        if len(pieces) != sizes[key]:
            raise UserError(f"checkpoint: '{key}' has {len(pieces)} of {sizes[key]} parts; is the file whole?")
        rest[key] = torch.cat([pieces[place] for place in range(sizes[key])])
    return rest


def split(house: StateDict, groups: Groups) -> dict[str, Tensor]:
    """The inverse of :func:`fuse`: equal shares of the rows under the official keys."""
    out: dict[str, Tensor] = {}
    for key, value in house.items():
        for pattern, names in groups.items():
            match = re.match(re.escape(pattern).replace(r"\#", r"(\d+)"), key)
            if match:
                for name, piece in zip(names, value.chunk(len(names)), strict=True):
                    out[_numbered(name, match) + key[match.end() :]] = piece.contiguous()
                break
        else:
            out[key] = value
    return out


def swap_halves(value: Tensor) -> Tensor:
    """[scale; shift] for [shift; scale], and back."""
    first, second = value.chunk(2)
    return torch.cat([second, first])


def _numbered(pattern: str, match: re.Match[str]) -> str:
    for number in match.groups():
        pattern = pattern.replace("#", number, 1)
    return pattern
