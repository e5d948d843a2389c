"""The Inception network of FID, from a local file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from repalign.errors import UserError
from repalign.metrics.features import to_uint8


class InceptionV3Features(nn.Module):
    """Inception-v3 of the TensorFlow FID: pooled features [B, 2048] and logits without bias [B, 1008].

    torch-fidelity's port, with TensorFlow's resize to 299 px from bytes. Its weights are
    ``weights-inception-2015-12-05-6726825d.pth`` of the torch-fidelity releases; they are never downloaded from here.

    Args:
        weights: path of that file.
        sha256: how the file's SHA-256 begins; other weights would give numbers that look like FID and are none.

    Raises:
        UserError: when the file is not named, missing, or another one.
    """

    def __init__(self, weights: str | None, sha256: str = "6726825d") -> None:
        super().__init__()
        wanted = "expected the path of weights-inception-2015-12-05-6726825d.pth; or choose metric=lite0"
        if weights is None:
            raise UserError(f"metric.network.weights: no Inception weights named; {wanted}")
        path = Path(weights)
        if not path.is_file():
            raise UserError(f"metric.network.weights: no file '{path}'; {wanted}")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(sha256):
            raise UserError(
                f"metric.network.weights: '{path}' has SHA-256 {found[:8]}..., expected {sha256}...; {wanted}"
            )
        try:
            # torch-fidelity unpickles without restraint; a file that the restricted reader accepts runs no code there.
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"metric.network.weights: '{path}' cannot be read as weights; {wanted}") from error
        self.fingerprint = f"inception-{found[:16]}"
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))

    def train(self, mode: bool = True) -> InceptionV3Features:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """Features and logits of pictures in [0, 1]."""
        features, logits = self.network(to_uint8(images))
        return features, logits
