"""Another hidden state of the same pass as the target."""

from __future__ import annotations

from collections.abc import Mapping

from repalign.errors import unknown_choice
from repalign.protocols import Context
from repalign.state import Tokens, TokenSpec


class SelfTarget:
    """A deeper layer of the same forward pass (LayerSync, arXiv:2510.12581); costs no further pass.

    Args:
        tap: name of the hidden state that the aligner's tap is pulled towards, for instance ``block.16``.
        detach: stop the gradient there, so that the shallow layer alone moves (the paper, and its SiT code). The
            released code for LoRA fine-tuning of a video model does not stop it.

    Raises:
        UserError: when the backbone has no such tap.
    """

    def __init__(self, tap: str, detach: bool = True) -> None:
        self.tap = tap
        self.taps = (tap,)
        self.detach = detach

    def spec(self, taps: Mapping[str, TokenSpec], features: Mapping[str, TokenSpec]) -> TokenSpec:
        """Layout of the layer."""
        if self.tap not in taps:
            raise unknown_choice("aligner.target.tap", self.tap, taps, "tap of this backbone")
        return taps[self.tap]

    def __call__(self, context: Context) -> Tokens:
        tokens = context.step.output.taps[self.tap]
        return tokens.with_data(tokens.data.detach()) if self.detach else tokens
