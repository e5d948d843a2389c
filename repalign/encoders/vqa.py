"""Questions about pictures, answered by yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from repalign.encoders.features import CLIP_MEAN, CLIP_STD, resized
from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.local_folder import load_network, load_reader
from repalign.encoders.scorer_folders import BLIP
from repalign.errors import UserError


class BlipVQA(Frozen):
    """BLIP for questions (Li et al., ICML 2022, arXiv:2201.12086): p(yes) / (p(yes) + p(no)) of the first token.

    That is the number of T2I-CompBench's BLIP-VQA. Pictures are resampled to the network's square, bicubic, with CLIP's
    mean and deviation; questions have at most 35 tokens. Where the network's vocabulary is longer than the tokenizer's,
    a question begins with its last entry ([ENC]), as in the official code.

    Args:
        folder: local, in the layout of ``transformers``.
        key: of the configuration, for messages.
        length: tokens of a question.

    Raises:
        UserError: one line when the weights are missing, hold something else, or know no 'yes' and 'no'.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | Path | None, key: str = "vqa.folder", length: int = 35) -> None:
        super().__init__()
        self.network: Any = load_network(folder, "BlipForQuestionAnswering", key, BLIP)
        self.tokenizer: Any = load_reader(folder, "AutoTokenizer", key, BLIP)
        known = self.tokenizer.get_vocab()
        if missing := [word for word in ("yes", "no") if word not in known]:
            raise UserError(f"{key}: the tokenizer in '{folder}' has no token '{missing[0]}'; expected {BLIP}")
        self.answers = [known["yes"], known["no"]]
        words = self.network.config.text_config.vocab_size
        self.begin = words - 1 if words > len(self.tokenizer) else None
        self.length = length
        self.size: int = self.network.config.vision_config.image_size
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).reshape(3, 1, 1), persistent=False)
        self.fingerprint = f"blip-vqa-{self.size}-{length}-{digest(self.network)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, pictures: UInt8[Tensor, "b 3 h w"], questions: Sequence[str]) -> Float[Tensor, " b"]:
        """Probability of yes against no for a picture and a question each.

        Pictures of one question are seen together and nothing is padded, so an answer does not depend on its batch.
        """
        chances = torch.empty(len(pictures))
        for question in dict.fromkeys(questions):
            own = [place for place, other in enumerate(questions) if other == question]
            chances[own] = self._of(pictures[own], question)
        return chances

    def _of(self, pictures: UInt8[Tensor, "b 3 h w"], question: str) -> Float[Tensor, " b"]:
        device, count = self.mean.device, len(pictures)
        images = (resized(pictures.to(device).float() / 255, self.size) - self.mean) / self.std
        asked = self.tokenizer(question, truncation=True, max_length=self.length, return_tensors="pt").input_ids
        if self.begin is not None:
            asked[:, 0] = self.begin
        seen = self.network.vision_model(pixel_values=images).last_hidden_state
        states = self.network.text_encoder(
            input_ids=asked.expand(count, -1).to(device), encoder_hidden_states=seen
        ).last_hidden_state
        start = torch.full((count, 1), self.network.decoder_start_token_id, device=device)
        logits = self.network.text_decoder(input_ids=start, encoder_hidden_states=states).logits[:, 0]
        return logits[:, self.answers].float().softmax(-1)[:, 0].cpu()
