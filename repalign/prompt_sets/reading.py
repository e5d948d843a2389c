"""Prompt files of benchmarks: read before heavy work, refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repalign.errors import UserError

# Of the classes that a configuration may name: where their prompts are named, and what should be there.
PROMPTS = {
    "repalign.prompt_sets.geneval.GenEval": (
        "prompt_set.file",
        "evaluation_metadata.jsonl of GenEval: tag, include, exclude and prompt on each line",
    ),
    "repalign.prompt_sets.compbench.CompBench": (
        "prompt_set.folder",
        "the prompt files of T2I-CompBench (its examples/dataset), such as color_val.txt",
    ),
}


def find_prompts(place: str | Path | None, key: str, expected: str) -> Path:
    """The file or folder of a benchmark's prompts; ``key`` ends in which of them it is.

    Raises:
        UserError: when none is named, or it is not there.
    """
    kind = key.rpartition(".")[2]
    if place is None:
        raise UserError(f"{key}: no {kind} named; expected {expected}")
    path = Path(place).expanduser()
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        raise UserError(f"{key}: no {kind} '{place}'; expected {expected}")
    return path


def read_entries(file: str | Path | None, key: str, expected: str) -> list[dict[str, Any]]:
    """The objects of a file with one per line.

    Raises:
        UserError: when there is no such file, or a line is no object.
    """
    found: list[dict[str, Any]] = []
    for number, line in enumerate(find_prompts(file, key, expected).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{key}: line {number} of '{file}' is no JSON; expected {expected}") from error
        if not isinstance(entry, dict):
            raise UserError(f"{key}: line {number} of '{file}' is no object; expected {expected}")
        found.append(entry)
    if not found:
        raise UserError(f"{key}: '{file}' is empty; expected {expected}")
    return found


def read_lines(file: Path, key: str, expected: str) -> list[str]:
    """The prompts of a file with one per line, blank ones left out.

    Raises:
        UserError: when there is no such file, or it is empty.
    """
    if not file.is_file():
        raise UserError(f"{key}: no file '{file}'; expected {expected}")
    found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise UserError(f"{key}: '{file}' is empty; expected {expected}")
    return found


def digest_of_texts(texts: Iterable[str]) -> str:
    """Twelve hexadecimal digits that stand for texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:12]
