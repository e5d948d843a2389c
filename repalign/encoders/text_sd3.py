"""The text encoders of Stable Diffusion 3: CLIP's text towers and T5, as its code runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.text_folder import check_length, load_text_network
from repalign.state import TextStates, TokenSpec


class CLIPTextEncoder(Frozen):
    """Hidden states before the last layer, without the final norm; the projected vector of the end token as pooled.

    CLIP-L (D = 768, P = 768) and OpenCLIP bigG (D = 1280, P = 1280) in Stable Diffusion 3; the padding token is the
    tokenizer's own. Only the causal mask is applied: padding is attended to where it comes earlier, and that is never.

    Args:
        folder, network, tokenizer, precision: see :func:`repalign.encoders.text_folder.load_text_network`.
        length: N, tokens per caption; longer ones are cut.

    Raises:
        UserError: naming ``text_encoders`` when packages or files are missing or hold something else.
    """

    def __init__(
        self,
        folder: str | Path | None,
        length: int = 77,
        network: str = "",
        tokenizer: str = "",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        check_length(length)
        self.network, self.tokenizer, words = load_text_network(
            folder, network, tokenizer, "CLIPTextModelWithProjection", precision
        )
        self.length = length
        self.spec = TokenSpec(self.network.config.hidden_size)
        self.pooled_dim: int | None = self.network.config.projection_dim
        self.fingerprint = f"clip-{length}-{digest(self.network, words, length)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> TextStates:
        """Captions -> states [B, N, D], mask [B, N], pooled vector [B, P], in float32; no gradient."""
        ids, mask = _tokens(self.tokenizer, captions, self.length, self.network.device)
        with torch.autocast(ids.device.type, enabled=False):
            output = self.network(input_ids=ids, output_hidden_states=True)
        return TextStates(output.hidden_states[-2].float(), mask, output.text_embeds.float())


class T5TextEncoder(Frozen):
    """States of T5's encoder after its final norm, padding neither hidden from it nor from who reads them; no vector.

    Stable Diffusion 3 takes the encoder of T5 v1.1 XXL (D = 4096) with 77 tokens (its code) or 256 (diffusers).
    PixArt-alpha hides the padding: that is :class:`repalign.encoders.text.TextEncoder` on the same folder.

    Args:
        folder, network, tokenizer, precision: see :func:`repalign.encoders.text_folder.load_text_network`.
        length: N, tokens per caption; longer ones are cut.

    Raises:
        UserError: naming ``text_encoders`` when packages or files are missing or hold something else.
    """

    def __init__(
        self,
        folder: str | Path | None,
        length: int = 77,
        network: str = "",
        tokenizer: str = "",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        check_length(length)
        self.network, self.tokenizer, words = load_text_network(folder, network, tokenizer, "T5EncoderModel", precision)
        self.length = length
        self.spec = TokenSpec(self.network.config.d_model)
        self.pooled_dim: int | None = None
        self.fingerprint = f"t5-{length}-{digest(self.network, words, length)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> TextStates:
        """Captions -> states [B, N, D] and mask [B, N], in float32; no gradient."""
        ids, mask = _tokens(self.tokenizer, captions, self.length, self.network.device)
        with torch.autocast(ids.device.type, enabled=False):
            output = self.network(input_ids=ids)
        return TextStates(output.last_hidden_state.float(), mask)


class AbsentTextEncoder(Frozen):
    """Stands where a text encoder is left out: zeros of its shape, as in training when it is dropped.

    Args:
        width: D of the states.
        length: N, tokens per caption.
        pooled: width of the vector; None for none.
    """

    def __init__(self, width: int, length: int = 77, pooled: int | None = None) -> None:
        super().__init__()
        self.length = length
        self.spec = TokenSpec(width)
        self.pooled_dim = pooled
        self.fingerprint = f"absent-{length}-{width}-{pooled}"
        self.place = torch.nn.Buffer(torch.zeros(()), persistent=False)

    def forward(self, captions: Sequence[str]) -> TextStates:
        """Zeros [B, N, D], a mask that hides all, a vector of zeros [B, P] where there is one."""
        size = len(captions)
        states = self.place.new_zeros(size, self.length, self.spec.dim)
        vector = None if self.pooled_dim is None else self.place.new_zeros(size, self.pooled_dim)
        return TextStates(states, torch.zeros_like(states[..., 0], dtype=torch.bool), vector)


class RandomTextEncoder(Frozen):
    """For debug=tiny: one random vector per byte, and their mean through a random matrix as the pooled vector.

    Args:
        width: D of the states.
        length: N, tokens per caption; longer ones are cut.
        pooled: width of the vector; None for none.
        seed: of the vectors.
    """

    def __init__(self, width: int, length: int = 8, pooled: int | None = None, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        self.spec = TokenSpec(width)
        self.pooled_dim = pooled
        self.table = torch.nn.Buffer(torch.randn(257, width, generator=generator))
        self.matrix = torch.nn.Buffer(torch.randn(width, pooled or 1, generator=generator) / width**0.5)
        self.fingerprint = f"random-{length}-{digest(self, length, pooled)}"

    def forward(self, captions: Sequence[str]) -> TextStates:
        """Captions -> states [B, N, D], mask [B, N], vector [B, P] where there is one."""
        rows = [list(caption.encode()[: self.length]) for caption in captions]
        ids = torch.tensor([row + [256] * (self.length - len(row)) for row in rows], device=self.table.device)
        states, mask = self.table[ids], ids != 256
        return TextStates(states, mask, None if self.pooled_dim is None else states.mean(1) @ self.matrix)


def _tokens(tokenizer: Any, captions: Sequence[str], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token numbers [B, N] and a mask that is true where a token is no padding."""
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids.to(device), tokens.attention_mask.bool().to(device)
