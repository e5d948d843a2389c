"""Folders of diffusers' ``AutoencoderKL``: ``config.json`` beside ``diffusion_pytorch_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from repalign.autoencoders.latent_norm import HasScale
from repalign.errors import UserError
from repalign.folders import new_folder
from repalign.reading import first_line

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

CONFIG = "config.json"
# Our option -> the entry of config.json, where the numbers are the same.
_OPTIONS = {
    "channels": "latent_channels",
    "widths": "block_out_channels",
    "depth": "layers_per_block",
    "groups": "norm_num_groups",
}


def check_config(path: str | Path | None, sizes: Mapping[str, Any]) -> None:
    """Compare the configuration of a diffusers folder with an autoencoder's sizes; other paths pass.

    Shapes of tensors show most differences too, but not the number of groups of a group norm.

    Raises:
        UserError: naming the option, its value and the folder's.
    """
    file = Path(path or "") / CONFIG
    if path is None or not file.is_file():
        return
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"autoencoder.weights: '{file}' cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(held, dict):
        raise UserError(f"autoencoder.weights: '{file}' holds a {type(held).__name__}, expected options by name")
    for option, entry in _OPTIONS.items():
        if held.get(entry, sizes[option]) != sizes[option]:
            raise UserError(
                f"autoencoder.{option}: {sizes[option]} here, but {held[entry]} in '{file}' ({entry}); set "
                f"autoencoder.{option}={held[entry]}, or choose the autoencoder that the folder holds"
            )


def write_folder(folder: str | Path, network: AutoencoderKL, norm: HasScale) -> None:
    """Write a complete folder, which ``AutoencoderKL.from_pretrained`` reads.

    The configuration holds ``scaling_factor`` and ``shift_factor`` for a norm with one number for all channels. For one
    number per channel it holds ``latents_mean`` and ``latents_std``, and a scaling factor of 1, so that pipelines that
    multiply by it agree with those that do not.

    Args:
        folder: target; must not exist, or be empty.
        network: whose weights are written.
        norm: between raw and normalised latents; of running statistics, the present ones.

    Raises:
        UserError: when the folder holds something, or when diffusers has no such architecture.
    """
    convolution = network.post_quant_conv
    if convolution is not None and convolution.in_channels != convolution.out_channels:
        raise UserError(
            "task.family: diffusers' AutoencoderKL has as many channels inside as in the latent, this autoencoder has "
            f"{convolution.out_channels} and {convolution.in_channels}; export it as ldm_vae"
        )
    network.register_to_config(**norm_entries(norm))
    with new_folder(folder) as partial:
        network.save_pretrained(partial)


def norm_entries(norm: HasScale) -> dict[str, Any]:
    """The entries of ``config.json`` that stand for a latent norm."""
    scale, bias = _numbers(norm.scale), _numbers(norm.bias)
    if len(scale) == len(bias) == 1:
        return {
            "scaling_factor": scale[0],
            "shift_factor": bias[0],  # a number even if 0: SD3's pipeline adds it unseen
            "latents_mean": None,
            "latents_std": None,
        }
    channels = max(len(scale), len(bias))
    scale, bias = scale * (channels // len(scale)), bias * (channels // len(bias))
    return {
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": bias,
        "latents_std": [1 / s for s in scale],
    }


def _numbers(values: Tensor) -> list[float]:
    # Through their shortest decimal form: 0.18215, not 0.18215000629425049.
    return [float(str(value)) for value in values.detach().flatten().cpu().numpy()]
