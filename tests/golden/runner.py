"""Golden numbers: our objects against stored outputs of the official codes.

A case is a folder with ``case.json`` (kind, config, procedure, tolerances) and ``tensors.safetensors`` (``weights/*``,
``inputs/*``, ``outputs/*``). A kind is a function that builds our objects from the case's config and returns outputs by
name; it is given neither the case's name nor its expected outputs.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """What a kind may see of a case.

    Attributes:
        config: sizes and options, the kind takes everything from here.
        procedure: how the official numbers were made, for people.
        inputs, weights: tensors by name.
        dtype: precision of the official run, in words.
    """

    config: Mapping[str, Any]
    procedure: str
    inputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    dtype: str


@dataclass(frozen=True)
class Verdict:
    """The result of one case; the differences are the worst over all outputs, None when they could not be taken."""

    case: str
    kind: str
    status: str  # PASS | FAIL | UNSUPPORTED
    worst_absolute: float | None = None
    worst_relative: float | None = None
    message: str = ""

    def line(self) -> str:
        """One line for people."""
        numbers = ""
        if self.worst_absolute is not None:
            numbers = f"  abs {self.worst_absolute:.2e}  rel {self.worst_relative:.2e}"
        return f"{self.status:<11} {self.kind:<24}{numbers}  {self.case}{'  ' + self.message if self.message else ''}"


Kind = Callable[[Case], Mapping[str, Tensor]]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a function as the adapter of a kind."""

    def register(function: Kind) -> Kind:
        if name in KINDS and KINDS[name] is not function:
            raise KeyError(f"golden kind '{name}' is registered twice")
        KINDS[name] = function
        return function

    return register


def load_kinds() -> None:
    """Import every module of ``tests.golden.kinds``."""
    package = importlib.import_module("tests.golden.kinds")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def only_keys(config: Mapping[str, Any], known: Collection[str], where: str = "config") -> None:
    """Refuse options that an adapter does not know, so that none is passed over in silence."""
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise KeyError(f"{where}: unknown option(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def find_cases(folder: Path) -> list[Path]:
    """Case folders in a folder (or the folder itself), sorted.

    Raises:
        FileNotFoundError: when there is none.
    """
    if (folder / "case.json").is_file():
        return [folder]
    cases = sorted(path.parent for path in folder.glob("*/case.json"))
    if not cases:
        raise FileNotFoundError(f"golden: no case.json in {folder} or in its folders")
    return cases


def run_case(folder: Path) -> Verdict:
    """Run one case; an error of the adapter is a FAIL with its message."""
    description = json.loads((folder / "case.json").read_text())
    name, kind_name = folder.name, description["kind"]
    if kind_name not in KINDS:
        return Verdict(name, kind_name, "UNSUPPORTED", message="no adapter for this kind")
    tensors = load_file(folder / "tensors.safetensors")
    case = Case(
        description["config"],
        description.get("procedure", ""),
        _under("inputs/", tensors),
        _under("weights/", tensors),
        description.get("dtype", "float32"),
    )
    try:
        found = KINDS[kind_name](case)
    except Exception as error:  # any error of an adapter is its failure, and the other cases still run
        text = " ".join(str(error).split())
        return Verdict(name, kind_name, "FAIL", message=f"{type(error).__name__}: {text}")
    expected = _under("outputs/", tensors)
    return compare(name, kind_name, found, expected, float(description["rtol"]), float(description["atol"]))


def compare(
    name: str, kind_name: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float, atol: float
) -> Verdict:
    """|found - expected| <= atol + rtol |expected| for every entry of every expected output."""
    worst_absolute = worst_relative = 0.0
    problems: list[str] = []
    for key, value in expected.items():
        if key not in found:
            problems.append(f"{key} missing")
            continue
        ours, theirs = found[key].detach().cpu().double(), value.double()
        if ours.shape != theirs.shape:
            problems.append(f"{key} has shape {list(ours.shape)}, expected {list(theirs.shape)}")
            continue
        close = torch.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
        if not close.all():
            problems.append(f"{key} differs in {int((~close).sum())} of {close.numel()} entries")
        # Equal infinities and two nans are no difference; a nan against a number is an infinite one.
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        difference = torch.where(same, 0.0, (ours - theirs).abs()).nan_to_num(nan=float("inf"))
        relative = difference / theirs.abs().clamp(min=atol / rtol if rtol else 1.0)
        if difference.numel():
            worst_absolute = max(worst_absolute, float(difference.max()))
            worst_relative = max(worst_relative, float(relative.max()))
    status = "FAIL" if problems else "PASS"
    return Verdict(name, kind_name, status, worst_absolute, worst_relative, "; ".join(problems))


def run_all(folders: Iterable[Path], report: Callable[[Verdict], None]) -> list[Verdict]:
    """Run cases one after the other and report each as it ends."""
    verdicts = []
    for folder in folders:
        verdicts.append(run_case(folder))
        report(verdicts[-1])
    return verdicts


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
