"""One vector per picture, for distances in other feature spaces than Inception's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.text_folder import check_plain
from repalign.errors import UserError
from repalign.protocols import Encoder
from repalign.reading import first_line

# Of the training of CLIP, the same for all its sizes.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resized(images: Float[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 s s"]:
    """Bicubic with a kernel that widens when it shrinks, clamped to [0, 1]: what picture libraries do."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


class EncoderFeatures(Frozen):
    """The class token of an encoder if it has one, else the mean over its grid tokens: [B, 3, H, W] -> ([B, D],).

    With the class token of DINOv2 ViT-L/14 at 224 px a Frechet distance on it is FDD (Stein et al., NeurIPS 2023,
    arXiv:2306.04675), whose official code resamples PNG files by Pillow; here the same kernel runs on tensors.

    Args:
        encoder: with an attribute ``fingerprint``; its own resampling does nothing when its input has ``size``.
        size: side in pixels that pictures are resampled to before the encoder.

    Raises:
        UserError: when the encoder has no fingerprint.
    """

    def __init__(self, encoder: Encoder, size: int = 224) -> None:
        super().__init__()
        fingerprint = getattr(encoder, "fingerprint", None)
        if fingerprint is None:
            raise UserError(f"metric.network.encoder: {type(encoder).__name__} has no fingerprint to keep numbers by")
        self.encoder = encoder
        self.size = size
        self.resize = f"bicubic, antialiased, to {size}"
        self.fingerprint = f"{fingerprint}-{'class' if encoder.spec.prefix else 'mean'}-{size}"

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"]]:
        """Features of pictures in [0, 1]."""
        tokens = self.encoder(resized(images, self.size))
        return ((tokens.data[:, 0] if tokens.prefix else tokens.data.mean(1)).float(),)


class ClipFeatures(Frozen):
    """Image embeddings of CLIP after the projection: what CMMD compares (arXiv:2401.09603). [B, 3, H, W] -> ([B, D],).

    CMMD is defined on CLIP ViT-L/14 at 336 px. Pictures are resampled to the network's side; nothing is cut off.

    Args:
        folder: with ``config.json`` and ``model.safetensors`` of a CLIP in the layout of transformers.

    Raises:
        UserError: when the folder is not named, or holds no CLIP.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | None) -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        key = "metric.network.folder"
        wanted = "expected a folder with config.json and model.safetensors of openai/clip-vit-large-patch14-336"
        if folder is None:
            raise UserError(f"{key}: no CLIP named; {wanted}")
        try:
            check_plain(Path(folder), key)
            network: Any = CLIPVisionModelWithProjection.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except UserError:
            raise
        except Exception as error:  # a folder of someone else; the library raises nearly every kind
            raise UserError(f"{key}: '{folder}' holds no CLIP ({first_line(error)}); {wanted}") from error
        self.network: nn.Module = network
        self.size: int = network.config.image_size
        self.resize = f"bicubic, antialiased, to {self.size}"
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).reshape(3, 1, 1), persistent=False)
        self.fingerprint = f"clip-{self.size}-{digest(network)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"]]:
        """Features of pictures in [0, 1]."""
        prepared = (resized(images, self.size) - self.mean) / self.std
        return (self.network(pixel_values=prepared).image_embeds.float(),)
