"""task=convert for autoencoders: published files in, ``autoencoder.safetensors`` out, and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, open_dict
from safetensors.torch import save_file

from lightning_modules.diffusion import DiffusionModule
from repalign.autoencoders.diffusers_folder import write_folder
from repalign.autoencoders.kl import KLAutoencoder
from repalign.autoencoders.kl_keys import to_ldm
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import HasScale, ScaleShift, require_norm
from repalign.autoencoders.running_norm import RunningStatistics
from repalign.autoencoders.weights import tensors_of
from repalign.errors import UserError, unknown_choice
from repalign.protocols import LatentNorm
from tasks.build import assemble, load_weights
from tasks.instantiate import build, check_targets


def convert_autoencoder(cfg: DictConfig) -> None:
    """Convert the weights of one KL autoencoder; the composed ``autoencoder`` gives the sizes that they must fit.

    Import reads any layout, whatever the family, and writes our .safetensors; it takes the place of
    ``autoencoder.weights``. Export reads ``task.input`` (a run's ``autoencoder.safetensors``, a checkpoint .ckpt of a
    composition that trains its autoencoder, or null for the composed autoencoder's own weights) and writes the family's
    layout. Latent statistics are those of the checkpoint, else those stored with the weights, else the composed ones.

    - ``ldm_vae``: .safetensors or .pt with the bare tensors (REPA-E; the statistics beside it, as
      ``<name>-latents-stats.pt``), .ckpt with the tensors under ``state_dict`` (LDM);
    - ``diffusers_vae``: a folder with configuration, latent norm included.

    Raises:
        UserError: unknown direction, weights that are missing or of another architecture; for a diffusers folder, a
            target that exists, or an autoencoder without latent statistics.
    """
    task, source = cfg.task, cfg.task.input
    if task.direction not in ("import", "export"):
        raise unknown_choice("task.direction", task.direction, ("import", "export"))
    if source is None and task.direction == "import":
        raise UserError("task.input: not set; give the published file, or the folder of a diffusers autoencoder")
    check_targets(cfg)
    if task.direction == "export" and source is not None and str(source).endswith(".ckpt"):
        autoencoder, norm = _of_checkpoint(cfg, source)
    else:
        autoencoder = _of_weights(cfg, source)
        norm = autoencoder.norm
        if source is not None and isinstance(autoencoder, KLAutoencoder):
            norm = autoencoder.stored_norm() or norm
    if not isinstance(autoencoder, SDAutoencoder):
        raise UserError(
            f"task.family: {task.family} is for KL autoencoders of latent diffusion, found "
            f"{type(autoencoder).__name__}; set autoencoder=sd_vae, sd3_vae, in_vae or va_vae"
        )
    target = Path(task.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    if task.direction == "import":
        autoencoder.save(target, {"source": Path(str(source)).name}, torch.float32)
    else:
        WRITERS[task.family](autoencoder, norm, target)
    print(f"wrote {target}")


def _of_weights(cfg: DictConfig, source: str | None) -> Any:
    node = cfg.autoencoder.copy()
    if source is not None:
        with open_dict(node):
            node.weights = source
    return build(node, "autoencoder")


def _of_checkpoint(cfg: DictConfig, source: str) -> tuple[Any, LatentNorm | None]:
    """Autoencoder and latent norm of a training; REPA-E's norm is the averaged one unless ``task.weights=live``."""
    module = assemble(cfg).module
    if not module.trains_autoencoder:
        raise UserError(
            f"task.input: {type(module).__name__} trains no autoencoder; give the experiment that '{source}' is of"
        )
    load_weights(module, source)
    joint = isinstance(module, DiffusionModule)
    return module.autoencoder, module.latent_norm(cfg.task.weights != "live") if joint else module.autoencoder.norm


def _write_ldm(autoencoder: SDAutoencoder, norm: LatentNorm | None, target: Path) -> None:
    tensors = {name: value.contiguous() for name, value in to_ldm(tensors_of(autoencoder)).items()}
    write: dict[str, Callable[[Path], Any]] = {
        ".safetensors": lambda file: save_file(tensors, file),
        ".pt": lambda file: torch.save(tensors, file),
        ".ckpt": lambda file: torch.save({"state_dict": tensors}, file),
    }
    if target.suffix not in write:
        raise unknown_choice("task.output", target.suffix, write, "ending")
    _replace(target, write[target.suffix])
    if target.suffix == ".pt" and isinstance(norm, (ScaleShift, RunningStatistics)):
        shape = (1, autoencoder.channels, 1, 1)
        numbers = {"latents_scale": norm.scale, "latents_bias": norm.bias}
        numbers = {name: value.detach().expand(shape).clone() for name, value in numbers.items()}
        _replace(target.with_name(f"{target.stem}-latents-stats.pt"), lambda file: torch.save(numbers, file))


def _replace(target: Path, write: Callable[[Path], Any]) -> None:
    partial = target.with_name(f".{target.name}.incomplete")
    write(partial)
    os.replace(partial, target)


def _write_diffusers(autoencoder: SDAutoencoder, norm: LatentNorm | None, target: Path) -> None:
    norm = require_norm(autoencoder) if norm is None else norm
    write_folder(target, autoencoder.network, cast(HasScale, norm))


Writer = Callable[[SDAutoencoder, LatentNorm | None, Path], None]
WRITERS: dict[str, Writer] = {"ldm_vae": _write_ldm, "diffusers_vae": _write_diffusers}
