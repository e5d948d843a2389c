"""Official REPA-E checkpoints (SiT with batch-normalised latents, autoencoder, discriminator), and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from repalign.autoencoders.kl_keys import to_house, to_ldm
from repalign.checkpoints.keys import StateDict
from repalign.checkpoints.repa import REPAAdapter


class REPAEAdapter:
    """Keys of End2End-Diffusion/REPA-E: REPA's, ``bn.*`` for the latent norm, and the networks of the first stage.

    The joint run keeps its networks under ``model`` or ``ema``, ``vae`` (always the live one) and ``discriminator``;
    files of the second stage (LDM-only) have neither of the last two.

    Args:
        aligners, encoder_depth: see :class:`repalign.checkpoints.repa.REPAAdapter`.
    """

    containers = ("model", "ema")
    sections = {"autoencoder": "vae", "discriminator": "discriminator"}

    def __init__(self, aligners: Sequence[str] = ("repa",), encoder_depth: int | None = None) -> None:
        self.repa = REPAAdapter(aligners, encoder_depth)

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: ``backbone``, ``aligners.<name>.head``, ``norm``; ``autoencoder``, ``discriminator`` if any.

        Args:
            official: the denoiser's keys as they are, the other networks' behind ``vae.`` and ``discriminator.``.
        """
        parts: dict[str, dict[str, Tensor]] = {}
        trunk = dict(official)
        for part, prefix in (*self.sections.items(), ("norm", "bn")):
            found = {k.removeprefix(f"{prefix}."): trunk.pop(k) for k in official if k.startswith(f"{prefix}.")}
            if found:
                parts[part] = to_house(found) if part == "autoencoder" else found
        return {**self.repa.from_official(trunk), **parts}

    def to_official(self, parts: Mapping[str, StateDict]) -> dict[str, Tensor]:
        """The official keys, prefixed as in :meth:`from_official`."""
        official = self.repa.to_official(dict(parts))
        for part, prefix in (*self.sections.items(), ("norm", "bn")):
            state = parts.get(part, {})
            tensors = to_ldm(state) if part == "autoencoder" else state
            official |= {f"{prefix}.{key}": value for key, value in tensors.items()}
        return official
