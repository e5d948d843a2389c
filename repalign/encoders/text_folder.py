"""Text networks and tokenizers of ``transformers`` from local folders."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

from repalign.errors import UserError, unknown_choice

KEY = "text_encoders"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a tokenizer reads of its folder: part of the fingerprint, for other tokens are other states.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model")


def load_text_network(
    folder: str | Path | None,
    network: str = "",
    tokenizer: str = "",
    kind: str = "AutoModelForTextEncoding",
    precision: str = "float32",
) -> tuple[Any, Any, str]:
    """A network, its tokenizer, and a digest of the tokenizer's files.

    Nothing is downloaded, and no code of the folder is run.

    Args:
        folder: local, of the Hugging Face layout; only safetensors are read.
        network: sub-folder of config.json and weights ('' for the folder itself); diffusers: ``text_encoder``.
        tokenizer: sub-folder of the tokenizer; diffusers: ``tokenizer``.
        kind: the class of ``transformers``.
        precision: of the weights: float32, bfloat16 or float16.

    Raises:
        UserError: naming ``text_encoders`` when packages or files are missing or hold something else.
    """
    if precision not in PRECISIONS:
        raise unknown_choice(f"{KEY}.precision", precision, PRECISIONS)
    if folder is None:
        raise UserError(f"{KEY}.folder: has no value; give a folder with config.json, tokenizer and safetensors")
    place, words = Path(folder).expanduser() / network, Path(folder).expanduser() / tokenizer
    if not (place / "config.json").is_file():
        raise UserError(
            f"{KEY}.folder: no config.json in '{place}'; give a folder with config.json, tokenizer and "
            "model.safetensors, or null for the embedded network where there is one"
        )
    transformers = package("transformers", "models")
    try:
        loaded = getattr(transformers, kind).from_pretrained(
            place, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=PRECISIONS[precision]
        )
        reader = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{KEY}.folder: '{place}' holds no text encoder that can be read ({str(error).splitlines()[0]})"
        ) from error
    return loaded, reader, _tokenizer_digest(words)


def check_length(length: int) -> None:
    """Refuse a number of tokens below 1.

    Raises:
        UserError: with the number.
    """
    if length < 1:
        raise UserError(f"{KEY}.length: expected 1 or more, found {length}")


def package(name: str, extra: str) -> ModuleType:
    """A package that is not part of the core.

    Raises:
        UserError: when it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{KEY}: needs the package {name.replace('_', '-')}, which is not installed; install the extra '{extra}': "
            f"pip install 'repalign[{extra}]'"
        ) from error


def _tokenizer_digest(folder: Path) -> str:
    files = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    sha = hashlib.sha256()
    for file in sorted(files):
        sha.update(file.name.encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()
