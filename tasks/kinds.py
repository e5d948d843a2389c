"""What an option may be, by what the source of its object declares: types, and the names it is compared with."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repalign.errors import UserError, unknown_choice
from tasks.signatures import Argument, constant, declared

_SCALARS: Mapping[str, type] = {"int": int, "float": float, "bool": bool, "str": str, "Path": str, "_PATH": str}
_LISTS = ("list", "tuple", "Sequence", "Collection", "Iterable")
_MAPPINGS = ("dict", "Mapping")
WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


@dataclass(frozen=True)
class Expected:
    """Types of plain values that are accepted, and texts when only some are."""

    types: frozenset[type]
    texts: tuple[Any, ...] = ()


def check_kinds(key: str, node: Mapping[str, Any]) -> None:
    """Every written option of an object against the type that its source declares; what cannot be read passes.

    Args:
        key: place of the object, for messages.
        node: plain, with ``_target_``, interpolations not resolved.

    Raises:
        UserError: naming the option, what was found and what was expected.
    """
    arguments = declared(node["_target_"], f"{key}._target_") or {}
    for name, value in node.items():
        argument = arguments.get(name)
        if argument is None or (isinstance(value, str) and ("${" in value or value == "???")):
            continue
        if isinstance(value, dict) and "_target_" in value:
            continue
        if isinstance(value, str) and (texts := _compared_with(name, argument)) and value not in texts:
            raise unknown_choice(f"{key}.{name}", value, texts)
        expected = _expected(argument.annotation, argument)
        if expected is None:
            continue
        if value in expected.texts and type(value) in map(type, expected.texts):
            continue
        if not _fits(value, expected.types):
            if isinstance(value, str) and expected.texts:
                raise unknown_choice(f"{key}.{name}", value, [str(text) for text in expected.texts])
            wanted = " or ".join(word for kind, word in WORDS.items() if kind in expected.types)
            wanted = wanted or "one of " + ", ".join(map(repr, expected.texts))
            raise UserError(f"{key}.{name}: expected {wanted}, found {value!r}")


def _fits(value: Any, types: frozenset[type]) -> bool:
    return type(value) in types or (type(value) is int and float in types)


def _expected(annotation: ast.expr | None, place: Argument) -> Expected | None:
    """None when the annotation names something that no plain value is."""
    if isinstance(annotation, ast.Constant):
        return Expected(frozenset({type(None)})) if annotation.value is None else None
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _union([annotation.left, annotation.right], place)
    if isinstance(annotation, ast.Name):
        if annotation.id in _SCALARS:
            return Expected(frozenset({_SCALARS[annotation.id]}))
        if annotation.id in (*_LISTS, *_MAPPINGS):
            return Expected(frozenset({list if annotation.id in _LISTS else dict}))
        held = constant(place.file, place.module, annotation.id)
        return None if held is None else _expected(held[0], Argument(None, held[1], held[2], place.owner))
    if not (isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name)):
        return None
    name, inner = annotation.value.id, annotation.slice
    items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        return Expected(frozenset(), tuple(item.value for item in items if isinstance(item, ast.Constant)))
    if name in ("Optional", "Union"):
        return _union([*items, *([ast.Constant(None)] if name == "Optional" else [])], place)
    if name in (*_LISTS, *_MAPPINGS):
        return Expected(frozenset({list if name in _LISTS else dict}))
    return None


def _union(parts: list[ast.expr], place: Argument) -> Expected | None:
    found = [_expected(part, place) for part in parts]
    known = [part for part in found if part is not None]
    if len(known) < len(found):
        return None
    types = frozenset().union(*(part.types for part in known))
    return Expected(types, sum((part.texts for part in known), ()))


def _compared_with(name: str, argument: Argument) -> list[str]:
    """The texts that the object itself accepts: of ``raise unknown_choice(key, name, CHOICES)`` in its source."""
    for call in ast.walk(argument.owner):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "unknown_choice"):
            continue
        if len(call.args) < 3 or ast.unparse(call.args[1]) not in (name, f"self.{name}"):
            continue
        return _texts_of(call.args[2], argument)
    return []


def _texts_of(node: ast.expr, place: Argument) -> list[str]:
    """Texts of a tuple, list, set or the keys of a mapping, written out or assigned at a module's top."""
    if isinstance(node, ast.Name):
        held = constant(place.file, place.module, node.id)
        return [] if held is None else _texts_of(held[0], Argument(None, held[1], held[2], place.owner))
    if isinstance(node, ast.Starred):
        return _texts_of(node.value, place)
    if isinstance(node, ast.BinOp):
        left, right = _texts_of(node.left, place), _texts_of(node.right, place)
        return [*left, *right] if left and right else []
    items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    found: list[str] = []
    for item in items:
        if isinstance(item, ast.Constant) and isinstance(item.value, str):
            found.append(item.value)
        else:
            inner = _texts_of(item, place) if isinstance(item, ast.Starred) else []
            if not inner:
                return []  # not all of them can be read
            found += inner
    return found
