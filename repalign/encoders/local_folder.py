"""Networks, tokenizers and image processors of ``transformers`` from local folders, for scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from repalign.encoders.scorer_folders import Wanted, find_folder
from repalign.encoders.text_folder import check_plain, package
from repalign.errors import UserError
from repalign.reading import first_line


def load_network(folder: str | Path | None, kind: str, key: str, wanted: Wanted) -> Any:
    """A network in float32. Nothing is downloaded, no code of the folder is run, only safetensors are read.

    Args:
        folder: with config.json and model.safetensors.
        kind: the class of ``transformers``.
        key: of the configuration, for messages.
        wanted: what the folder must hold.

    Raises:
        UserError: naming the key when the folder is not named, is not there, or holds something else.
    """
    place = _place(folder, key, wanted)
    transformers = package("transformers", "models", key)
    return _read(
        lambda: getattr(transformers, kind).from_pretrained(
            place, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        ),
        place,
        key,
        wanted,
    )


def load_reader(folder: str | Path | None, kind: str, key: str, wanted: Wanted) -> Any:
    """The tokenizer (``AutoTokenizer``) or image processor (``AutoImageProcessor``) of a folder.

    Raises:
        UserError: as :func:`load_network`.
    """
    place = _place(folder, key, wanted)
    transformers = package("transformers", "models", key)
    return _read(
        lambda: getattr(transformers, kind).from_pretrained(place, local_files_only=True, trust_remote_code=False),
        place,
        key,
        wanted,
    )


def _place(folder: str | Path | None, key: str, wanted: Wanted) -> Path:
    place = find_folder(folder, key, wanted)
    check_plain(place, key)
    return place


def _read(read: Any, place: Path, key: str, wanted: Wanted) -> Any:
    try:
        return read()
    except Exception as error:  # a folder of someone else; the library raises nearly every kind
        raise UserError(f"{key}: '{place}' cannot be read ({first_line(error)}); expected {wanted}") from error
