"""Renaming checkpoint keys by patterns, in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from repalign.errors import UserError

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class KeyMap:
    """Pairs of official and house key patterns; ``#`` stands for a block number.

    Example:
        ``("blocks.#.attn.", "blocks.#.attention.")`` renames every key that begins so.
    """

    pairs: Sequence[tuple[str, str]]

    def to_house(self, official: StateDict) -> dict[str, Tensor]:
        """House keys for official ones.

        Raises:
            UserError: for a key that no pattern knows.
        """
        return {_rename(key, self.pairs): value for key, value in official.items()}

    def to_official(self, house: StateDict) -> dict[str, Tensor]:
        """Official keys for house ones."""
        backwards = [(ours, theirs) for theirs, ours in self.pairs]
        return {_rename(key, backwards): value for key, value in house.items()}


def _rename(key: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), key)
        if match:
            for number in match.groups():
                new = new.replace("#", number, 1)
            return new + key[match.end() :]
    raise UserError(f"checkpoint: key '{key}' is none of this family's; is this another architecture?")
