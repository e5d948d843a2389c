"""task=convert where the first stage was trained too: networks that stand beside the denoiser's in an official file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.diffusion import DiffusionModule
from repalign.autoencoders.kl_vae import SDAutoencoder
from repalign.autoencoders.latent_norm import ScaleShift
from repalign.autoencoders.running_norm import RunningStatistics
from repalign.autoencoders.weights import NORM, tensors_of
from repalign.checkpoints.keys import StateDict
from repalign.errors import UserError

TOLERANCE = 1e-3  # relative; of statistics that were rounded on their way through a file


def sections_of(adapter: Any) -> tuple[str, ...]:
    """Keys of the official file below which the further networks stand; most families have none."""
    return tuple(getattr(adapter, "sections", {}).values())


def stage_of(module: DiffusionModule) -> dict[str, nn.Module]:
    """The networks of the first stage, where they are trained too: autoencoder, discriminator."""
    return dict(module.stage.items())


def stage_states(module: DiffusionModule) -> dict[str, dict[str, Tensor]]:
    """Their state dicts for an official file, and the latent statistics where they are fixed (second stage).

    Raises:
        UserError: when the autoencoder has no published layout.
    """
    stage, norm = stage_of(module), module.autoencoder.norm
    autoencoder = stage.get("autoencoder")
    if autoencoder is not None and not isinstance(autoencoder, SDAutoencoder):
        raise UserError(
            f"autoencoder: {type(autoencoder).__name__} has no published layout; an official file holds a KL "
            "autoencoder of latent diffusion (autoencoder=sd_vae_mse, in_vae, va_vae)"
        )
    states = {name: tensors_of(part) if name == "autoencoder" else part.state_dict() for name, part in stage.items()}
    if isinstance(norm, ScaleShift):
        states["norm"] = RunningStatistics(module.autoencoder.channels, initial=norm).state_dict()
    return states


def in_sections(official: StateDict, containers: tuple[str, ...], sections: tuple[str, ...]) -> dict[str, Any]:
    """The content of an official file: the denoiser in each of its containers, further networks beside it."""
    beside = {
        name: {k.removeprefix(f"{name}."): v for k, v in official.items() if k.startswith(f"{name}.")}
        for name in sections
    }
    trunk = {k: v for k, v in official.items() if not k.startswith(tuple(f"{name}." for name in sections))}
    return {**dict.fromkeys(containers, trunk), **{name: state for name, state in beside.items() if state}}


def check_first_stage(module: DiffusionModule, parts: Mapping[str, dict[str, Tensor]], source: Path) -> None:
    """The file's autoencoder and latent statistics are those that the composition will decode by.

    In a composition that trains the autoencoder the statistics are the autoencoder's too: they are added to its part.

    Raises:
        UserError: for a joint file and a composition whose autoencoder is frozen, or the other way round; for a
            file without latent statistics; for fixed statistics that differ from the file's.
    """
    joint = "autoencoder" in module.stage
    if joint and "autoencoder" not in parts:
        raise UserError(
            f"checkpoint: '{source}' has no section 'vae', but {type(module).__name__} trains the autoencoder; give "
            "the joint run's file, or choose the recipe of the second stage (experiment=e2e_vae_sit_xl)"
        )
    if not joint and "autoencoder" in parts:
        raise UserError(
            f"checkpoint: '{source}' is of a joint run and holds its autoencoder, which {type(module).__name__} does "
            "not train; choose its recipe (experiment=repa_e_sit_xl, ...)"
        )
    if "norm" in module.trained and "norm" not in parts:
        raise UserError(
            f"checkpoint: '{source}' has no latent statistics 'bn.*', which this composition follows; give a file of "
            "REPA-E, or choose the family it is of (task.family=repa)"
        )
    if joint and "norm" in module.trained:
        parts["autoencoder"].update({NORM + key: value.clone() for key, value in parts["norm"].items()})
    if "norm" in parts and isinstance(module.autoencoder.norm, ScaleShift):
        _check_statistics(module.autoencoder.norm, parts["norm"], source)


def _check_statistics(norm: ScaleShift, held: StateDict, source: Path) -> None:
    bias, std = held["running_mean"], held["running_var"].sqrt()
    channels = (len(norm.bias.flatten()), len(norm.scale.flatten()))
    fits = all(count in (1, len(bias)) for count in channels)
    if not fits or bool(
        ((norm.bias.flatten() - bias).abs() > TOLERANCE * std).any()
        | ((norm.scale.flatten() * std - 1).abs() > TOLERANCE).any()
    ):
        raise UserError(
            f"autoencoder.norm: other statistics than those that '{source}' was trained with (its first mean is "
            f"{_first(bias)}, here {_first(norm.bias)}; its first deviation {_first(std)}, here "
            f"{_first(1 / norm.scale)}); set autoencoder.norm.path to the statistics of its autoencoder"
        )


def _first(values: Tensor) -> str:
    return f"{torch.flatten(values)[0].item():.5g}"
