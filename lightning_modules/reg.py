"""REG."""

from __future__ import annotations

from lightning_modules.repa import REPA
from repalign.encoders.streams import ClassToken


class REG(REPA):
    """Representation Entanglement for Generation (Wu et al., NeurIPS 2025, arXiv:2507.01467).

    The state is (z, c): the image's latent and the class token of a frozen encoder, noised at one time with noises of
    their own. c_t enters as one token before the patches and its velocity is predicted beside the latent's:
    loss = mean |v_z - (eps_z - z)|^2 + beta mean |v_c - (eps_c - c)|^2 + lambda REPA over all N + 1 tokens,
    beta 0.03, lambda 0.5. Sampling begins with noise in both and decodes z alone.
    Differs from REPA by its contract: a class token among the streams, and an encoder target that has one to align.
    """

    def contract(self) -> None:
        super().contract()
        self.require(
            any(isinstance(source, ClassToken) for source in self.streams.values()),
            "diffuses a class token; set streams=class_token token_io=patch_and_class encoders.main.class_token=true",
        )
        self.require(
            all(aligner.keep_prefix for aligner in self.aligners.values()),
            "aligns the class token too; set class_token=true for the encoder of every aligner",
        )
