"""ReDi."""

from __future__ import annotations

from lightning_modules.generative import Generative
from repalign.encoders.streams import PCAFeatures
from repalign.guidance.representation import RepresentationGuidance
from repalign.objectives.streams import WeightedStreams


class ReDi(Generative):
    """Joint image-feature diffusion (Kouzelis et al., NeurIPS 2025, arXiv:2504.16064).

    The state is (x, z): the image's latent and the first 8 principal components of a frozen encoder's patch tokens, as
    a map of the latent's size, both at one time: loss = mean |v_x - u_x|^2 + lambda_z mean |v_z - u_z|^2, lambda_z 1.
    Sampling denoises both and decodes x alone; representation guidance extrapolates from the prediction without z.
    The base with a contract: a stream of components that were fitted on this encoder, and features that training hides
    when sampling will take them away. Aligners are optional (the paper's ReDi + REPA).
    """

    def contract(self) -> None:
        sources = [source for source in self.streams.values() if isinstance(source, PCAFeatures)]
        self.require(bool(sources), "diffuses features; set streams=pca_features token_io=channels")
        for source in sources:
            fitted = source.pca.provenance.get("encoder")
            found = getattr(self.encoders[source.encoder], "fingerprint", None)
            self.require(
                not fitted or not found or fitted == found,
                f"pca.path: components were fitted on encoder {fitted}, this is {found}; run task=fit_pca with it",
            )
        dropout = self.objective.dropout if isinstance(self.objective, WeightedStreams) else None
        self.require(
            not isinstance(self.guidance, RepresentationGuidance) or (dropout is not None and dropout.probability > 0),
            "representation guidance hides features, as training then must; set objective=streams_with_dropout",
        )
