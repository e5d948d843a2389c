"""Weights of autoencoders: read, write, check, name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from repalign.errors import UserError, nearest
from repalign.reading import first_line, read_torch

KEY = "autoencoder.weights"
PROVENANCE = "provenance"
NORM = "norm."
DIFFUSERS = "diffusion_pytorch_model.safetensors"


def read_weights(path: str | Path | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and provenance of a weights file.

    Args:
        path: .safetensors; a diffusers folder; or .pt, .ckpt, .bin, read without running code from the file.
            ``state_dict`` is unwrapped.

    Returns:
        The tensors by key, and the provenance that :func:`write_weights` stored ({} for foreign files).

    Raises:
        UserError: naming ``autoencoder.weights``, the path and what to do.
    """
    if path is None:
        raise UserError(
            f"{KEY}: not set; give the path of a weights file (conf/autoencoder/*.yaml say which one, and which "
            "environment variable may hold it), or 'random'"
        )
    file = Path(path).expanduser()
    file = file / DIFFUSERS if file.is_dir() else file
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(
            f"{KEY}: no file '{file}'.{nearest(file.name, beside)} Give the path of a weights file, or 'random'."
        )
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                stored = json.loads((opened.metadata() or {}).get(PROVENANCE, "{}"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
                return tensors, stored if isinstance(stored, dict) else {}
        held = read_torch(file)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:  # RecursionError is a RuntimeError
        raise UserError(
            f"{KEY}: '{file}' cannot be read ({first_line(error)}); is it torn? Copy or train it again."
        ) from error
    held = held.get("state_dict", held) if isinstance(held, Mapping) else held
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise UserError(f"{KEY}: '{file}' holds no state dict; expected tensors by name")
    return {str(name): value for name, value in held.items()}, {}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of an autoencoder's networks by key, its latent norm left out: raw latents do not depend on it."""
    return {name: value for name, value in module.state_dict().items() if not name.startswith(NORM)}


def write_weights(module: nn.Module, path: str | Path, provenance: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write a module's tensors as .safetensors with its provenance as JSON in the metadata.

    Args:
        module: whose networks are written.
        path: target; folders are made.
        provenance: plain values; latent statistics live here too.
        dtype: of the stored tensors; float16 halves the file and changes 8-bit pictures by less than one level.
    """
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in tensors_of(module).items()}
    partial = file.with_name(f".{file.name}.incomplete")
    # Not save_file(): that makes files which only their owner can read.
    partial.write_bytes(save(tensors, {PROVENANCE: json.dumps(dict(provenance))}))
    partial.replace(file)


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], path: str | Path | None) -> None:
    """Load tensors into a module of exactly the same keys and shapes, in the module's own precision.

    Raises:
        UserError: naming the first key that differs.
    """
    own = tensors_of(module)
    for key in sorted(own.keys() | tensors.keys()):
        expected, found = (_size(side.get(key)) for side in (own, tensors))
        if expected != found:
            raise UserError(
                f"{KEY}: '{path}' is of another architecture: '{key}' is {found} in the file, {expected} in this "
                "autoencoder; set its sizes as in the file's provenance"
            )
    module.load_state_dict(tensors, strict=False)  # the norm alone may be missing


def fingerprint_of(module: nn.Module) -> str:
    """16 hexadecimal digits that stand for class and weights: the name under which latents may be cached."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, value in sorted(tensors_of(module).items()):
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().float().numpy()).data)
    return digest.hexdigest()[:16]


def _size(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"
