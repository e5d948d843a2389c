"""task=convert task.family=lora: the low-rank additions of a run into a folder that peft reads."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from lightning_modules.diffusion import DiffusionModule
from repalign.backbones.clocks import unwrapped
from repalign.backbones.tuning import save_adapter
from repalign.errors import UserError
from tasks.build import assemble, load_weights


def convert_lora(cfg: DictConfig) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` to the folder ``task.output``.

    Raises:
        UserError: for another direction than export, a missing checkpoint, or a composition without ``tuning=lora``.
    """
    task = cfg.task
    if task.direction != "export":
        raise UserError(
            f"task.direction: the family lora is exported alone, found '{task.direction}'; set task.direction=export"
        )
    if task.input is None:
        raise UserError("task.input: not set; give the checkpoint of a run with tuning=lora")
    module: DiffusionModule = assemble(cfg).module
    load_weights(module, task.input)
    owner = module.trained if task.weights == "live" else module.ema.module
    backbone = unwrapped(owner["backbone"])
    save_adapter(backbone, Path(task.output))
    print(f"wrote {task.output}")
