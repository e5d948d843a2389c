"""Prompt files of benchmarks: read before heavy work, refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repalign.errors import UserError


def read_entries(file: str | Path | None, key: str, expected: str) -> list[dict[str, Any]]:
    """The objects of a file with one per line.

    Raises:
        UserError: when there is no such file, or a line is no object.
    """
    if file is None or not Path(file).expanduser().is_file():
        raise UserError(f"{key}: no file {'named' if file is None else repr(str(file))}; expected {expected}")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(Path(file).expanduser().read_text(encoding="utf-8").splitlines(), 1):
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
