"""Argument names of a class or function, read from its source without importing it.

Importing Lightning or torchvision takes seconds; a misspelt option should be named at once. Nothing is executed.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from repalign.errors import UserError, nearest


@dataclass(frozen=True)
class Argument:
    """An argument of a target as its source declares it.

    Attributes:
        annotation: its type, as written; None where there is none.
        file: the source that the annotation is written in.
        owner: the definition it belongs to.
    """

    annotation: ast.expr | None
    file: Path
    module: str
    owner: ast.ClassDef | ast.FunctionDef


def arguments_of(target: str, key: str) -> list[str] | None:
    """Names that may be passed to the target by keyword; None when it takes any (``**kwargs``) or is not Python source.

    Args:
        target: dotted path, ``package.module.Name``.
        key: its place in the configuration, for messages.

    Raises:
        UserError: when the module or the name does not exist.
    """
    found = declared(target, key)
    return None if found is None else list(found)


def declared(target: str, key: str) -> dict[str, Argument] | None:
    """The same with what the source says of each argument.

    Raises:
        UserError: when the module or the name does not exist.
    """
    module, _, name = target.rpartition(".")
    file = _file_of(module)
    if file is None:
        raise UserError(f"{key}: no module '{module}' for '{target}'")
    if file.suffix != ".py":
        return None
    found = _resolve(file, module, name)
    if found is None:
        raise UserError(f"{key}: '{module}' has no '{name}'.{nearest(name, _names(file))}")
    return _arguments(*found)


def origin_of(target: str, key: str) -> tuple[str, bool]:
    """The module whose source defines the target, and whether that is a class.

    Raises:
        UserError: when the module or the name does not exist, or is no Python source.
    """
    module, _, name = target.rpartition(".")
    file = _file_of(module)
    if file is None:
        raise UserError(f"{key}: no module '{module}' for '{target}'")
    found = _resolve(file, module, name) if file.suffix == ".py" else None
    if found is None:
        raise UserError(f"{key}: '{module}' has no '{name}'.{nearest(name, _names(file))}")
    return found[1], isinstance(found[2], ast.ClassDef)


@cache
def _file_of(module: str) -> Path | None:
    """Source file of a module. Parents are looked up by path, because find_spec would import them."""
    search: list[str] | None = None
    spec = None
    for part in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or [])
    return None if spec is None or spec.origin is None else Path(spec.origin)


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _names(file: Path) -> list[str]:
    return [node.name for node in _tree(file).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]


# Bases whose own __init__ has no argument of a name.
_TAKE_NOTHING = ("ABC", "abc.ABC", "Protocol", "Generic", "nn.Module", "object")

Found = tuple[Path, str, ast.ClassDef | ast.FunctionDef]


def _resolve(file: Path, module: str, name: str) -> Found | None:
    """The definition behind a name, through ``from x import name``."""
    for node in _tree(file).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return file, module, node
    found = _imported(file, module, name)
    return None if found is None else _resolve(*found)


def _imported(file: Path, module: str, name: str) -> tuple[Path, str, str] | None:
    """File, module and name that ``from x import name`` takes a name from."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    origin = _absolute(node, module, file.name == "__init__.py")
                    source = _file_of(origin)
                    if source is not None and source.suffix == ".py" and source != file:
                        return source, origin, alias.name
    return None


def _absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])])


def constant(file: Path, module: str, name: str) -> tuple[ast.expr, Path, str] | None:
    """What a module assigns to a name at its top, through ``from x import name``, and where that is written."""
    for node in _tree(file).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return (node.value, file, module) if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value else None
    found = _imported(file, module, name)
    return None if found is None else constant(*found)


def _arguments(file: Path, module: str, node: ast.ClassDef | ast.FunctionDef) -> dict[str, Argument] | None:
    if isinstance(node, ast.FunctionDef):
        return None if node.args.kwarg else _named(node, file, module, node)
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            own = _named(item, file, module, node)
            own.pop("self", None)
            if not item.args.kwarg:
                return own
            # Bases that take nothing by name: the rest goes to a call that cannot be seen from here.
            inherited = _inherited(file, module, node)
            return {**inherited, **own} if inherited else None
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [i for i in node.body if isinstance(i, ast.AnnAssign)]
        return {
            i.target.id: Argument(i.annotation, file, module, node) for i in fields if isinstance(i.target, ast.Name)
        }
    return _inherited(file, module, node) if node.bases else {}


def _named(
    node: ast.FunctionDef, file: Path, module: str, owner: ast.ClassDef | ast.FunctionDef
) -> dict[str, Argument]:
    given = (*node.args.args, *node.args.kwonlyargs)
    return {argument.arg: Argument(argument.annotation, file, module, owner) for argument in given}


def _inherited(file: Path, module: str, node: ast.ClassDef) -> dict[str, Argument] | None:
    """Arguments of all bases together; None when one of them takes any, or none of them can be read."""
    names: dict[str, Argument] = {}
    readable = False
    for base in node.bases:
        if ast.unparse(base).split("[")[0] in _TAKE_NOTHING:
            readable = True
            continue
        found = _resolve(file, module, base.id) if isinstance(base, ast.Name) else None
        if found is None or found[2] is node:
            continue
        readable = True
        arguments = _arguments(*found)
        if arguments is None:
            return None
        names = {**arguments, **names}
    return names if readable else None
