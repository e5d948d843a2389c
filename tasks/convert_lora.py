"""task=convert task.family=lora: the low-rank additions of a run into a folder that peft reads, or into the network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

from lightning_modules.diffusion import DiffusionModule
from repalign.backbones.adapters import merge, save_adapter
from repalign.backbones.clocks import unwrapped
from repalign.backbones.tuning import PREFIX
from repalign.errors import UserError
from tasks.build import assemble, load_weights

FORMAT = "repalign"


def convert_lora(cfg: DictConfig) -> None:
    """Export to the folder ``task.output``, or merge into the file ``task.output``.

    Export writes ``adapter_config.json`` and ``adapter_model.safetensors``. Merging writes the plain backbone with the
    additions folded in, as every .safetensors of ours: for ``init_from``, ``tuning.weights`` and, with
    ``tuning=full``, ``task.checkpoint``.

    Raises:
        UserError: for another direction, a missing checkpoint, or a composition without ``tuning=lora``.
    """
    task = cfg.task
    if task.direction not in WRITERS:
        raise UserError(
            f"task.direction: the family lora is exported or merged alone, found '{task.direction}'; set "
            "task.direction=export (a folder for peft) or merge (one .safetensors of the whole backbone)"
        )
    if task.input is None:
        raise UserError("task.input: not set; give the checkpoint of a run with tuning=lora")
    module: DiffusionModule = assemble(cfg).module
    load_weights(module, task.input)
    owner: Any = module.trained if task.weights == "live" else module.ema.module
    backbone = unwrapped(owner["backbone"])
    assert isinstance(backbone, nn.Module)
    WRITERS[task.direction](backbone, Path(task.output))
    print(f"wrote {task.output}")


def _merge(backbone: nn.Module, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise UserError(f"task.output: '{file.name}'; a merged network is a .safetensors")
    merged = {f"{PREFIX}{key}": value.contiguous() for key, value in merge(backbone).state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.incomplete")
    save_file(merged, partial, {"format": FORMAT, "family": "lora"})
    os.replace(partial, file)


WRITERS = {"export": save_adapter, "merge": _merge}
