"""Text networks and tokenizers of ``transformers`` from local folders."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from repalign.errors import UserError, unknown_choice
from repalign.reading import first_line

KEY = "text_encoders"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Entries of a configuration that name code, and the implementations of attention that are no code of a hub.
_CODE = ("auto_map", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal", "custom_pipelines")
_ATTENTION = ("eager", "sdpa", "flash_attention_2")
_MOST_CONFIG = 1 << 20  # bytes; larger JSON files are vocabularies
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
    if not (kind.isidentifier() and hasattr(getattr(transformers, kind, None), "from_pretrained")):
        raise UserError(
            f"{KEY}.kind: transformers has no network '{kind}'; AutoModelForTextEncoding reads most folders"
        )
    check_plain(place, f"{KEY}.folder")
    check_plain(words, f"{KEY}.folder")
    try:
        loaded = getattr(transformers, kind).from_pretrained(
            place, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=PRECISIONS[precision]
        )
        reader = transformers.AutoTokenizer.from_pretrained(words, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a folder of someone else; the library raises nearly every kind
        raise UserError(
            f"{KEY}.folder: '{place}' holds no text encoder that can be read ({first_line(error)})"
        ) from error
    return loaded, reader, _tokenizer_digest(words)


def check_plain(folder: Path, key: str) -> None:
    """Refuse a folder of transformers that asks for code: of its own (``auto_map``), of a hub, or of an adapter.

    ``trust_remote_code=False`` is given too; advisories of 2026 were about configurations that turned it on.

    Raises:
        UserError: naming the file and the entry.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{key}: '{folder}' holds an adapter, whose base may be anywhere; give a whole network")
    for file in sorted(folder.glob("*.json")):
        try:
            held = json.loads(file.read_bytes()) if file.stat().st_size < _MOST_CONFIG else {}
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{key}: '{file}' cannot be read as JSON ({first_line(error)})") from error
        for entry in _CODE if isinstance(held, dict) else ():
            if held.get(entry) and not (entry.startswith("_attn") and held[entry] in _ATTENTION):
                raise UserError(f"{key}: '{file}' asks for code ('{entry}': {str(held[entry])[:80]}); remove the entry")


def check_length(length: int) -> None:
    """Refuse a number of tokens below 1.

    Raises:
        UserError: with the number.
    """
    if length < 1:
        raise UserError(f"{KEY}.length: expected 1 or more, found {length}")


def package(name: str, extra: str, key: str = KEY) -> ModuleType:
    """A package that is not part of the core.

    Raises:
        UserError: when it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}: needs the package {name.replace('_', '-')}, which is not installed; install the extra '{extra}': "
            f"pip install 'repalign[{extra}]'"
        ) from error


def _tokenizer_digest(folder: Path) -> str:
    files = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    sha = hashlib.sha256()
    for file in sorted(files):
        sha.update(file.name.encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()
