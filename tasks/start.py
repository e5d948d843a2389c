"""The weights that a training begins with, when they are another training's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from callbacks.checkpoint import read_checkpoint
from lightning_modules.base import RunModule
from lightning_modules.diffusion import DiffusionModule
from repalign.backbones.adapters import adapted_networks
from repalign.errors import UserError
from repalign.seals import require_whole
from tasks.convert import parts_of, read_parts

POSITIONS = ("pos_embed", "pos_embed_mid")


def start_from(module: RunModule, path: str | Path) -> list[str]:
    """Fill the live and the averaged weights from a file; optimizer, step count and random streams begin anew.

    A .safetensors of ``task=convert`` fills both with the same weights, a .ckpt of a run each with its own. The
    backbone must be in the file; heads of aligners and latent statistics are taken where they are. Fixed positions are
    this composition's own, whose grid or spacing may be another: so a training at 512 px may begin with the weights of
    256 px. Rotary positions (DDT) are in no file and are interpolated by the backbone itself.

    Returns:
        Names of the parts and positions that stay as this composition made them.

    Raises:
        UserError: when the file is missing, torn, foreign or of another architecture, or nothing is denoised here.
    """
    if not isinstance(module, DiffusionModule):
        raise UserError(f"init_from: {type(module).__name__} has no backbone; give autoencoder.weights=FILE instead")
    if adapted_networks(module.trained):
        raise UserError("init_from: tuning=lora begins with tuning.weights; give the file there, and init_from=null")
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(f"init_from: no file '{file}'; give a .safetensors of task=convert, or a .ckpt of a run")
    kept: list[str] = []
    for name, owner in (("trained", module.trained), ("ema.module", module.ema.module)):
        assert isinstance(owner, nn.ModuleDict)
        parts = parts_of(owner)
        given = read_parts(file) if file.suffix == ".safetensors" else _of_run(file, name, owner, parts)
        kept = [part for part in parts if part not in given]
        if "backbone" in kept:
            raise UserError(f"init_from: '{file}' holds no backbone of this composition; compose the file's experiment")
        for part, state in given.items():
            if part in parts:
                kept += _fill(parts[part], part, state, file)
    return kept


def _of_run(file: Path, name: str, owner: nn.Module, parts: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The parts in a checkpoint of ours, by their places in ``owner``."""
    require_whole(file)
    try:
        content = read_checkpoint(file, optimizers=False)["state_dict"]
    except Exception as error:  # the reader raises many kinds; to the person they are one
        raise UserError(f"init_from: '{file}' is no checkpoint of a run ({type(error).__name__})") from error
    places = {id(part): place for place, part in owner.named_modules()}
    found = {}
    for part, own in parts.items():
        prefix = f"{name}.{places[id(own)]}."
        state = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        if state:
            found[part] = state
    return found


def _fill(part: nn.Module, name: str, state: dict[str, Tensor], file: Path) -> list[str]:
    """Load one part but for its fixed positions; those that differ from the file's are returned by name."""
    own, fixed = part.state_dict(), dict(part.named_buffers())
    tables = {key: own[key] for key in POSITIONS if key in state and key in fixed}
    kept = [key for key, table in tables.items() if not torch.equal(table.cpu(), state[key])]
    state = {**state, **tables}
    for key in sorted(own.keys() | state.keys()):
        sizes = [tuple(x.shape) if x is not None else "absent" for x in (state.get(key), own.get(key))]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"init_from: '{name}.{key}' is {sizes[0]} in '{file}', {sizes[1]} in this composition; choose the "
                "experiment or backbone that the file was trained with"
            )
    part.load_state_dict(state)
    return [f"{name}.{key}" for key in kept]
