"""Official ReDi checkpoints to the house's ``DiT`` with ``ChannelIO`` and an aligner head, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repalign.checkpoints.dit import keys_of
from repalign.checkpoints.keys import StateDict
from repalign.checkpoints.repa import REPAAdapter


class ReDiAdapter:
    """Keys of zelaki/ReDi: SiT's over the joined channels, and with REPA one ``projector.{0,2,4}``.

    Convention of the weights: time runs from noise to data (``ReversedClock``), the latent's channels come first. The
    components are a file of their own there and are not part of the checkpoint.

    Args:
        aligners: at most one, whose head is the projector.

    Raises:
        UserError: when the file has a projector but no aligner is configured.
    """

    containers = ("model", "ema")

    def __init__(self, aligners: Sequence[str] = ("repa",)) -> None:
        self._repa = REPAAdapter(aligners, keys=keys_of("io.patches"))

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: ``backbone`` and, with a projector, ``aligners.<name>.head``."""
        return self._repa.from_official(_renamed(official, "projector.", "projectors.0."))

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict: trunk and projector."""
        return _renamed(self._repa.to_official(parts), "projectors.0.", "projector.")


def _renamed(state: StateDict, old: str, new: str) -> dict[str, Tensor]:
    return {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in state.items()}
