"""Collecting hidden states by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from repalign.errors import unknown_choice
from repalign.state import Tokens, TokenSpec


class TapCollector:
    """Keeps the hidden states that were asked for and knows when the last one has come.

    Raises:
        UserError: when a name is not among ``specs``; the line gives the nearest valid tap.
    """

    def __init__(self, wanted: Collection[str], specs: Mapping[str, TokenSpec]) -> None:
        for name in wanted:
            if name not in specs:
                raise unknown_choice("tap", name, specs, "tap of this backbone")
        self.wanted = wanted
        self.found: dict[str, Tokens] = {}

    def offer(self, name: str, tokens: Tokens) -> None:
        """Keep the tokens when their name was asked for."""
        if name in self.wanted:
            self.found[name] = tokens

    @property
    def complete(self) -> bool:
        """Whether nothing is still to come."""
        return len(self.found) == len(set(self.wanted))
