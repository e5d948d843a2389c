"""Pictures and captions in one space: CLIP with both towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from repalign.encoders.features import CLIP_MEAN, CLIP_STD
from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.local_folder import load_network, load_reader
from repalign.encoders.scorer_folders import CLIP

KEY = "clip.folder"


class ClipImageText(Frozen):
    """Embeddings of CLIP after both projections (Radford et al., ICML 2021, arXiv:2103.00020), not normalised.

    Pictures are prepared as in the official code: the shorter side to the network's, bicubic, then the middle cut out;
    here the kernel runs on tensors instead of Pillow's bytes. Captions longer than the network's context are cut.

    Args:
        folder: of ``transformers``, local.
        key: of the configuration, for messages.

    Attributes:
        fingerprint: changes with weights and preparation.
        resize: in words, for the protocol of numbers.

    Raises:
        UserError: one line when the weights are missing or are no CLIP.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | Path | None, key: str = KEY) -> None:
        super().__init__()
        network: Any = load_network(folder, "CLIPModel", key, CLIP)
        self.network, self.tokenizer = network, load_reader(folder, "AutoTokenizer", key, CLIP)
        self.size: int = network.config.vision_config.image_size
        self.length: int = network.config.text_config.max_position_embeddings
        self.resize = f"bicubic, antialiased, shorter side to {self.size}, middle"
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).reshape(3, 1, 1), persistent=False)
        self.fingerprint = f"clip-text-{self.size}-{digest(network, self.length)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b d"]]:
        """Embeddings of pictures in [0, 1]."""
        prepared = (middle(images, self.size) - self.mean) / self.std
        seen = self.network.vision_model(pixel_values=prepared).pooler_output
        return (self.network.visual_projection(seen).float(),)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embeddings of captions."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.mean.device)
        read = self.network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return self.network.text_projection(read).float()


def middle(images: Float[Tensor, "b 3 h w"], size: int) -> Float[Tensor, "b 3 s s"]:
    """The shorter side to ``size``, bicubic with a kernel that widens when it shrinks, then the middle square."""
    height, width = images.shape[-2:]
    sides = [max(size, round(side * size / min(height, width))) for side in (height, width)]
    if sides != [height, width]:
        images = F.interpolate(images, size=sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in sides)
    return images[..., top : top + size, left : left + size]
