"""What pictures are asked for: a class label each, or a caption each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from repalign.errors import UserError

Wanted = Int[Tensor, " n"] | Sequence[str]


def taken(wanted: Wanted, indices: Sequence[int]) -> Wanted:
    """Some of them, by place."""
    return wanted[torch.tensor(list(indices))] if isinstance(wanted, Tensor) else [wanted[i] for i in indices]


def on_device(wanted: Wanted, device: torch.device | str) -> Wanted:
    """Labels on a device; captions are text."""
    return wanted.to(device) if isinstance(wanted, Tensor) else wanted


def rows_of(wanted: Wanted) -> Int[Tensor, " n"]:
    """A number for each: its label, or the place of the first caption that reads the same."""
    if isinstance(wanted, Tensor):
        return wanted
    places = {caption: place for place, caption in reversed(list(enumerate(wanted)))}
    return torch.tensor([places[caption] for caption in wanted])


def captions_for(count: int, captions: Sequence[str] | None, given: Sequence[str] | None, key: str) -> list[str]:
    """A caption for each picture: those that were given, in turn; else captions of the data, evenly spaced.

    Args:
        count: number of pictures.
        captions: of the data.
        given: asked for; None for the data's.
        key: the configuration key of ``given``, for messages.

    Raises:
        UserError: when there are none.
    """
    if given is not None:
        if not given:
            raise UserError(f"{key}: an empty list; give captions, or null for captions of the data")
        return [str(given[place % len(given)]) for place in range(count)]
    if not captions:
        raise UserError(f"{key}: these data have no captions to draw pictures of; set {key}=[...]")
    return [captions[place * len(captions) // count] for place in range(count)]
