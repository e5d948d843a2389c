"""Which weights of a backbone are trained: all of them, or low-rank additions to given ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from repalign.errors import UserError

PREFIX = "backbone/"  # of the backbone's tensors in a file of task=convert


def full(backbone: nn.Module) -> nn.Module:
    """Every weight is trained, from its initial value: nothing to do."""
    return backbone


def lora(
    backbone: nn.Module, *, weights: str | Path, rank: int, alpha: float, layers: Sequence[str], dropout: float = 0.0
) -> nn.Module:
    """Low-rank adaptation (LoRA, arXiv:2106.09685) of given weights: W x + alpha / rank B A x, W fixed, through peft.

    Changes the backbone in place: its linear layers of the given names get A and B, everything else stops asking for
    gradients. B is zero at first, so the tuned network begins as the given one. Average and checkpoint hold all of it.

    Args:
        backbone: not yet behind its clock.
        weights: file of ``task=convert``, or ``random`` to leave the initial weights (for trials).
        rank: of the additions.
        alpha: their scale, times rank.
        layers: how the names of the adapted linear layers end, for instance ``attention.qkv``.
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
        _fill(backbone, Path(weights))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), lora_dropout=dropout)  # type: ignore
    try:
        inject_adapter_in_model(config, backbone)
    except ValueError as error:
        raise UserError(f"tuning.layers: no linear layer of this backbone is named {' or '.join(layers)}") from error
    return backbone


def _fill(backbone: nn.Module, file: Path) -> None:
    """Load the backbone's tensors of a converted file, all of them.

    Raises:
        UserError: naming ``tuning.weights``.
    """
    if not file.is_file():
        raise UserError(f"tuning.weights: no file '{file}'; give a .safetensors of task=convert")
    try:
        held = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"tuning.weights: '{file}' cannot be read as safetensors; use task=convert") from error
    try:
        backbone.load_state_dict({k.removeprefix(PREFIX): v for k, v in held.items() if k.startswith(PREFIX)})
    except RuntimeError as error:
        raise UserError(
            f"tuning.weights: '{file}' holds another architecture than this composition; choose the experiment or "
            "backbone that it was converted with"
        ) from error


def save_adapter(backbone: nn.Module, folder: Path) -> None:
    """Write the additions of :func:`lora` alone, as peft keeps them: ``PeftModel.from_pretrained(backbone, folder)``.

    The network that they are put on again is the plain backbone with the weights that were given, not behind a clock.

    Raises:
        UserError: when the backbone has no additions.
    """
    configs = getattr(backbone, "peft_config", None)
    if not configs:
        raise UserError("task.family: lora exports low-rank additions, this composition has none; set tuning=lora")
    [(name, config)] = configs.items()
    additions = {
        f"base_model.model.{key.replace(f'.{name}.', '.')}": value.contiguous()
        for key, value in backbone.state_dict().items()
        if "lora_" in key
    }
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    partial = folder / ".adapter_model.safetensors.incomplete"
    save_file(additions, partial)
    os.replace(partial, folder / "adapter_model.safetensors")
