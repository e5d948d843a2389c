"""Which weights of a backbone are trained: all of them, or low-rank additions to given ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from repalign.backbones.adapters import mark_given
from repalign.errors import UserError, unknown_choice
from repalign.reading import read_torch
from repalign.seals import require_whole

PREFIX = "backbone/"  # of the backbone's tensors in a file of task=convert
AVERAGE = "ema.module.backbone."  # of the averaged backbone's in a checkpoint of a run
CLOCK = "backbone."  # where a clock is around it
ALL = "all"


def full(backbone: nn.Module) -> nn.Module:
    """Every weight is trained, from its initial value: nothing to do."""
    return backbone


def lora(
    backbone: nn.Module,
    *,
    weights: str | Path,
    rank: int,
    alpha: float,
    layers: Sequence[str] | str,
    dropout: float = 0.0,
) -> nn.Module:
    """Low-rank adaptation (LoRA, arXiv:2106.09685) of given weights: W x + alpha / rank B A x, W fixed, through peft.

    Changes the backbone in place: its linear layers of the given names get A and B, everything else stops asking for
    gradients. B is zero at first, so the tuned network begins as the given one. The average shares what is given, and
    checkpoints hold the additions alone (:mod:`repalign.backbones.adapters`): the same ``weights`` are read again
    whenever such a checkpoint is.

    Args:
        backbone: not yet behind its clock.
        weights: file of ``task=convert``, checkpoint of a run (its averaged weights), or ``random`` for the initial
            ones (for trials).
        rank: of the additions.
        alpha: their scale, times rank.
        layers: how the names of the adapted linear layers end, for instance ``attention.qkv``; ``all`` for every
            linear layer (SD3). The projections of ``nn.MultiheadAttention`` (DeepFlow's VeRA) are none.
        dropout: on the input of A.

    Raises:
        UserError: when peft is not installed, the file is missing or of another architecture, or no layer is so named.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "tuning=lora needs the package peft; install the extra: pip install 'repalign[lora]'"
        ) from error
    if str(weights) != "random":
        _fill(backbone, Path(weights).expanduser())
    options: dict[str, Any] = {"lora_alpha": alpha, "target_modules": _names(backbone, layers)}
    config = LoraConfig(r=rank, lora_dropout=dropout, **options)
    mark_given(backbone)
    inject_adapter_in_model(config, backbone)
    return backbone


def _names(backbone: nn.Module, layers: Sequence[str] | str) -> list[str]:
    """Names of the linear layers that are meant.

    Raises:
        UserError: for an ending that none has.
    """
    # Not those inside PyTorch's attention (a subclass): it reads their weights itself, past any addition.
    linear = [name for name, part in backbone.named_modules() if type(part) is nn.Linear]
    if isinstance(layers, str):
        if layers != ALL:
            raise UserError(f"tuning.layers: expected a list of names, or all, found '{layers}'; write [{layers}]")
        return linear
    found: list[str] = []
    for ending in layers:
        named = [name for name in linear if name == ending or name.endswith(f".{ending}")]
        if not named:
            endings = dict.fromkeys(".".join(name.split(".")[-2:]) for name in linear)
            raise unknown_choice("tuning.layers", ending, endings, "name of a linear layer of this backbone")
        found += named
    return [*dict.fromkeys(found)]


def _fill(backbone: nn.Module, file: Path) -> None:
    """Load the backbone's tensors of a converted file or a checkpoint, all of them.

    Raises:
        UserError: naming ``tuning.weights``.
    """
    if not file.is_file():
        raise UserError(
            f"tuning.weights: no file '{file}'; give a .safetensors of task=convert, or a .ckpt of a run (one file)"
        )
    try:
        backbone.load_state_dict(_of_run(file) if file.suffix == ".ckpt" else _converted(file))
    except RuntimeError as error:
        raise UserError(
            f"tuning.weights: '{file}' holds another architecture than this composition; choose the experiment or "
            "backbone that it was converted with"
        ) from error


def _converted(file: Path) -> dict[str, Tensor]:
    try:
        held = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"tuning.weights: '{file}' cannot be read as safetensors; use task=convert") from error
    return {key.removeprefix(PREFIX): value for key, value in held.items() if key.startswith(PREFIX)}


def _of_run(file: Path) -> dict[str, Tensor]:
    require_whole(file)
    try:
        held = read_torch(file)["state_dict"]
    except Exception as error:  # the reader raises many kinds; to the person they are one
        raise UserError(f"tuning.weights: '{file}' is no checkpoint of a run ({type(error).__name__})") from error
    found = {key.removeprefix(AVERAGE): value for key, value in held.items() if key.startswith(AVERAGE)}
    if found and all(key.startswith(CLOCK) for key in found):
        return {key.removeprefix(CLOCK): value for key, value in found.items()}
    return found
