"""Official REPA checkpoints (SiT with projectors) to the house's ``DiT`` and aligner heads, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from repalign.checkpoints.dit import KEYS
from repalign.checkpoints.keys import KeyMap, StateDict
from repalign.errors import UserError


class REPAAdapter:
    """Keys of sihyun-yu/REPA: DiT's, plus ``projectors.k.{0,2,4}`` which are the heads of the aligners.

    Args:
        aligners: names of the aligners in the order of the official projectors.
        encoder_depth: needed for legacy files alone, whose blocks after the tap are called ``decoder_blocks.j``
            (= ``blocks.{j + encoder_depth}``).
        keys: of the backbone.

    Raises:
        UserError: when the file has more projectors than ``aligners`` names, or legacy keys without a depth.
    """

    containers = ("model", "ema")

    def __init__(
        self, aligners: Sequence[str] = ("repa",), encoder_depth: int | None = None, keys: KeyMap = KEYS
    ) -> None:
        self.aligners = list(aligners)
        self.keys = keys
        self.encoder_depth = encoder_depth

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: ``backbone`` and ``aligners.<name>.head`` for every projector."""
        trunk: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in official.items():
            projector = re.match(r"projectors\.(\d+)\.", key)
            if projector is None:
                trunk[self._modern(key)] = value
                continue
            index = int(projector[1])
            if index >= len(self.aligners):
                raise UserError(
                    f"checkpoint: projector {index} found, but only {len(self.aligners)} aligner(s) are configured "
                    f"({', '.join(self.aligners)}); add one aligner per encoder of the checkpoint"
                )
            head = parts.setdefault(f"aligners.{self.aligners[index]}.head", {})
            head["layers." + key[projector.end() :]] = value
        return {"backbone": self.keys.to_house(trunk), **parts}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict: trunk and projectors."""
        official = self.keys.to_official(parts["backbone"])
        for index, name in enumerate(self.aligners):
            for key, value in parts.get(f"aligners.{name}.head", {}).items():
                official[f"projectors.{index}.{key.removeprefix('layers.')}"] = value
        return official

    def _modern(self, key: str) -> str:
        legacy = re.match(r"decoder_blocks\.(\d+)\.", key)
        if legacy is None:
            return key
        if self.encoder_depth is None:
            raise UserError(f"checkpoint: legacy key '{key}'; set encoder_depth to the tap of that run (REPA: 8)")
        return f"blocks.{int(legacy[1]) + self.encoder_depth}.{key[legacy.end() :]}"
