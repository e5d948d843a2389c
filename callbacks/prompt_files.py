"""Captions and prompts from files: a line each, JSON lines, COCO's annotations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repalign.errors import UserError

FIELDS = ("prompt", "caption", "text")


def read_prompts(path: str | Path, key: str) -> list[str]:
    """The prompts of a file, in its order.

    Args:
        path: ``.txt`` with a prompt per line, blank lines left out; ``.jsonl`` with a field ``prompt``, ``caption`` or
            ``text`` per line; ``.json`` with a list of texts, or COCO's ``captions_*.json``: of each picture, in the
            order of their numbers, the caption with the lowest number.
        key: of the configuration, for messages.

    Raises:
        UserError: when the file is missing, of another kind, or empty.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: no file '{file}'; expected .txt, .jsonl or .json with prompts")
    if file.suffix not in READERS:
        raise UserError(f"{key}: '{file}' is {file.suffix or 'without a suffix'}, expected {', '.join(READERS)}")
    try:
        found = READERS[file.suffix](file.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{key}: '{file}' cannot be read as prompts ({type(error).__name__}: {error})") from error
    if not found:
        raise UserError(f"{key}: '{file}' holds no prompt")
    return found


def asked_for(task: Any) -> tuple[Sequence[str] | None, str]:
    """The captions that a configuration asks for, by ``task.prompts`` or ``task.prompts_file``, and the key.

    Args:
        task: a mapping with ``prompts``, and perhaps ``prompts_file``.

    Raises:
        UserError: when both are given, or the file holds none.
    """
    file = task.get("prompts_file")
    if file is None:
        return task.get("prompts"), "task.prompts"
    if task.get("prompts") is not None:
        raise UserError("task.prompts, task.prompts_file: two sources of captions; leave one null")
    return read_prompts(file, "task.prompts_file"), "task.prompts_file"


def read_jsonl(text: str) -> list[dict[str, Any]]:
    """An object per line; blank lines left out.

    Raises:
        ValueError: for a line that is none.
    """
    found = [json.loads(line) for line in text.splitlines() if line.strip()]
    for number, entry in enumerate(found, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"entry {number} is no object")
    return found


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _jsonl(text: str) -> list[str]:
    found = []
    for number, entry in enumerate(read_jsonl(text), 1):
        name = next((field for field in FIELDS if field in entry), None)
        if name is None:
            raise ValueError(f"entry {number} has no field {', '.join(FIELDS)}")
        found.append(str(entry[name]))
    return found


def _json(text: str) -> list[str]:
    held = json.loads(text)
    if isinstance(held, list):
        return [str(entry) for entry in held]
    first: dict[int, str] = {}
    for entry in sorted(held["annotations"], key=lambda entry: entry["id"]):
        first.setdefault(entry["image_id"], " ".join(entry["caption"].split()))
    return [first[image] for image in sorted(first)]


READERS: dict[str, Callable[[str], list[str]]] = {".txt": _lines, ".jsonl": _jsonl, ".json": _json}
