"""What is known of each frozen encoder: architecture, input, tap, where its weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from repalign.errors import unknown_choice


@dataclass(frozen=True)
class Card:
    """One encoder of ``cards.yaml``.

    Attributes:
        name: of the card, the value of config key ``card``.
        family: who trained it; says how its weight files are read.
        timm: name of the architecture in timm.
        dim: D of its tokens.
        patch: side of a patch in pixels.
        mean: of the input's channels in [0, 1].
        std: of the input's channels.
        final_norm: whether the patch tokens pass the network's last norm.
        licence: of the weights.
        resize_first: resample before normalising.
        architecture: arguments that differ from timm's.
        hub: repository of the weights on the Hugging Face Hub.
        url: of the official weight file, when the Hub has none.
        source: where to get the weights by hand.
    """

    name: str
    family: str
    timm: str
    dim: int
    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    final_norm: bool
    licence: str
    resize_first: bool = False
    architecture: Mapping[str, Any] = field(default_factory=dict)
    hub: str | None = None
    url: str | None = None
    source: str | None = None


@cache
def read_cards() -> Mapping[str, Card]:
    """All cards by name."""
    held = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))
    return {name: Card(name=name, **{**held["families"][own["family"]], **own}) for name, own in held["cards"].items()}


def read_card(name: str) -> Card:
    """The card of a name.

    Raises:
        UserError: for a name that no card has, with the nearest that one has.
    """
    cards = read_cards()
    if name not in cards:
        raise unknown_choice("encoder.card", name, cards, "encoder")
    return cards[name]
