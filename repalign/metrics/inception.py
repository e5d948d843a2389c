"""The Inception network of FID, sFID and the inception score, from a local file."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from repalign.errors import UserError
from repalign.metrics.features import Features, to_uint8
from repalign.metrics.inception_file import WANTED, find_inception
from repalign.reading import read_torch

SPATIAL_CHANNELS = 7


class InceptionV3Features(nn.Module):
    """Inception-v3 of the TensorFlow FID: pooled features [B, 2048], logits without bias [B, 1008], spatial [B, 2023].

    torch-fidelity's port, with TensorFlow's resize to 299 px from bytes. Its weights are
    ``weights-inception-2015-12-05-6726825d.pth`` of the torch-fidelity releases; they are never downloaded from here.
    The spatial features are the first 7 channels of the 17 x 17 map that the 1x1 branch of the block gives which
    TensorFlow's graph calls ``mixed_6`` (sFID, arXiv:2103.03841), flattened as [17, 17, 7]; which block that is
    was concluded from the order of the blocks and not compared with TensorFlow's numbers.

    Args:
        weights: path of that file; None: where torch-fidelity keeps it, ``hub/checkpoints`` of torch's cache.
        sha256: how the file's SHA-256 begins; other weights would give numbers that look like FID and are none.

    Raises:
        UserError: when the file is not named, missing, or another one.
    """

    def __init__(self, weights: str | None, sha256: str = "6726825d") -> None:
        super().__init__()
        path = find_inception(weights)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(sha256):
            raise UserError(
                f"metric.network.weights: '{path}' has SHA-256 {found[:8]}..., expected {sha256}...; {WANTED}"
            )
        try:
            # torch-fidelity unpickles without restraint; a file that the restricted reader accepts runs no code there.
            read_torch(path)
        except Exception as error:
            raise UserError(f"metric.network.weights: '{path}' cannot be read as weights; {WANTED}") from error
        self.resize = "bilinear of TensorFlow 1, to 299"
        self.fingerprint = f"inception-{found[:16]}"
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        self._early: list[Tensor] = []
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._early.append(output)

    def train(self, mode: bool = True) -> InceptionV3Features:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Features:
        """Features of pictures in [0, 1]."""
        self._early.clear()
        pooled, logits = self.network(to_uint8(images))
        early = rearrange(self._early.pop()[:, :SPATIAL_CHANNELS], "b c h w -> b (h w c)")
        return Features(pooled, logits, early)
