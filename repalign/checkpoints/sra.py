"""Official SRA checkpoints (SiT or DiT with a projection head) to the house's ``DiT`` and aligner head, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repalign.checkpoints.dit import KEYS
from repalign.checkpoints.keys import StateDict

HEAD = "ap_head."


class SRAAdapter:
    """Keys of vvvvvjdy/SRA: DiT's, plus ``ap_head.linear{1,2}`` which is the head of the aligner.

    The averaged weights hold a head as well, which nothing reads. Without aligners the head stays behind.

    Args:
        aligners: the first is the one whose head it is.
    """

    containers = ("model", "ema")

    def __init__(self, aligners: Sequence[str] = ("sra",)) -> None:
        self.heads = [f"aligners.{name}.head" for name in aligners[:1]]

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: ``backbone`` and ``aligners.<name>.head`` where the file has one."""
        trunk = {key: value for key, value in official.items() if not key.startswith(HEAD)}
        head = {key.removeprefix(HEAD): value for key, value in official.items() if key.startswith(HEAD)}
        return {"backbone": KEYS.to_house(trunk), **({name: head for name in self.heads} if head else {})}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict: trunk and head."""
        heads = [parts[name] for name in self.heads if name in parts]
        return KEYS.to_official(parts["backbone"]) | {HEAD + key: value for h in heads for key, value in h.items()}
