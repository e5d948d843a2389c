"""What a tap is aligned with."""

from __future__ import annotations

from collections.abc import Mapping

from repalign.errors import unknown_choice
from repalign.protocols import Context
from repalign.state import Tokens, TokenSpec


class EncoderTarget:
    """Tokens of a frozen encoder on the clean image (REPA, arXiv:2410.06940).

    Args:
        encoder: name of the encoder among the configured ones (config key ``encoders.<name>``).

    Raises:
        UserError: when no encoder of that name is configured.
    """

    taps = ()

    def __init__(self, encoder: str = "main") -> None:
        self.encoder = encoder

    def spec(self, taps: Mapping[str, TokenSpec], features: Mapping[str, TokenSpec]) -> TokenSpec:
        """Layout of the encoder's tokens."""
        if self.encoder not in features:
            raise unknown_choice("aligner.target.encoder", self.encoder, features, "encoder; choose one by encoder=...")
        return features[self.encoder]

    def __call__(self, context: Context) -> Tokens:
        tokens = context.features(self.encoder)
        return tokens.with_data(tokens.data.detach())
