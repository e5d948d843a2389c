"""Between raw latents (what an autoencoder returns) and normalised latents (what is diffused).

A norm is part of the autoencoder, so that whoever decodes cannot use another one than whoever encoded. An autoencoder
whose latents nobody has measured has none; :func:`require_norm` then says how to measure them. Statistics that follow
an autoencoder under training are in :mod:`repalign.autoencoders.running_norm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.protocols import Autoencoder, LatentNorm
from repalign.reading import first_line, read_torch
from repalign.state import State, map_state

PATH_KEY = "autoencoder.norm.path"


class ScaleShift(nn.Module):
    """normalised = (raw - bias) * scale, with one number for all channels or one per channel.

    SD-VAE: scale 0.18215, bias 0 (Rombach et al., CVPR 2022); SD3: scale 1.5305, bias 0.0609 (Esser et al., ICML 2024).

    Args:
        scale: a number, or C numbers.
        bias: a number, or C numbers.

    Raises:
        UserError: when a scale is zero or not finite, or when scale and bias are lists of different lengths.
    """

    scale: Float[Tensor, "c 1 1"]
    bias: Float[Tensor, "c 1 1"]

    def __init__(self, scale: float | Sequence[float], bias: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        scales, biases = _per_channel(scale), _per_channel(bias)
        if not bool((torch.isfinite(scales) & (scales != 0)).all()):
            raise UserError(f"autoencoder.norm.scale: expected finite numbers other than 0, found {scale}")
        if len(scales) != len(biases) and 1 not in (len(scales), len(biases)):
            raise UserError(
                f"autoencoder.norm: {len(scales)} scales but {len(biases)} biases; give one of each per channel"
            )
        # Not in the state dict: the numbers come from the configuration or from the metadata of the weights.
        self.register_buffer("scale", scales, persistent=False)
        self.register_buffer("bias", biases, persistent=False)

    def normalize(self, raw: State) -> State:
        """Raw latents [B, C, H, W] -> normalised latents."""
        return map_state(lambda x: (x - self.bias) * self.scale, raw)

    def denormalize(self, latent: State) -> State:
        """Normalised latents [B, C, H, W] -> raw latents."""
        return map_state(lambda x: x / self.scale + self.bias, latent)

    def extra_repr(self) -> str:
        """The numbers, for ``print(autoencoder)``."""
        return f"scale={self.scale.flatten().tolist()}, bias={self.bias.flatten().tolist()}"


class HasScale(Protocol):
    """A norm that is a scale and a bias, fixed or running."""

    @property
    def scale(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor: ...


class Statistics(ScaleShift):
    """normalised = (raw - mean_c) / std_c per channel c, measured over a data set.

    Args:
        mean: C numbers.
        std: C positive numbers.

    Raises:
        UserError: when the lengths differ or a standard deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != len(std):
            raise UserError(f"autoencoder.norm: {len(mean)} means but {len(std)} standard deviations")
        if not all(s > 0 for s in std):
            raise UserError(f"autoencoder.norm.std: expected positive numbers, found {list(std)}")
        super().__init__([1 / s for s in std], mean)


def statistics_from_file(path: str | Path | None) -> ScaleShift | None:
    """The norm that a file of latent statistics describes; None for no file, which stands for no statistics.

    Values may have any shape with C (or one) elements. What is read, the first that is there:

    - ``mean`` and ``std``: ``statistics.safetensors`` of ``task=precompute``, LightningDiT's ``latents_stats.pt``;
    - ``latent_mean`` and ``latent_std`` in the metadata of weights that training an autoencoder wrote;
    - ``latents_scale`` = 1 / std and ``latents_bias`` = mean: REPA-E's ``<vae>-latents-stats.pt``;
    - ``latents_mean`` and ``latents_std``: ``config.json`` of a diffusers autoencoder (a ``scaling_factor`` beside them
      is not applied, as in most of its pipelines; SDXL's multiplies by it);
    - ``scaling_factor`` and ``shift_factor``: the same file of an autoencoder without statistics.

    Args:
        path: .safetensors; .pt of tensors; .json; or the folder of a diffusers autoencoder.

    Raises:
        UserError: naming ``autoencoder.norm.path`` when the file is missing, unreadable or holds none of these.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    file = file / "config.json" if file.is_dir() else file
    held = _read(file)
    for (first, second), make in _LAYOUTS.items():
        if held.get(first) is not None and held.get(second) is not None:
            return make(_listed(held[first]), _listed(held[second]))
    if held.get("scaling_factor") is not None:
        return ScaleShift(_listed(held["scaling_factor"]), _listed(held.get("shift_factor") or 0.0))
    missing = " and ".join(f"'{name}'" for name in ("mean", "std") if name not in held)
    raise UserError(
        f"{PATH_KEY}: '{file}' has no {missing}; it holds {', '.join(map(str, held)) or 'nothing'}. Expected: "
        + ", or ".join(" and ".join(pair) for pair in _LAYOUTS)
    )


def mean_and_std(norm: HasScale, channels: int) -> dict[str, list[float]]:
    """``latent_mean`` and ``latent_std``, C numbers each: a norm as statistics that a file of weights may carry."""
    mean, std = (values.detach().flatten().expand(channels).tolist() for values in (norm.bias, 1 / norm.scale))
    return {"latent_mean": mean, "latent_std": std}


def require_norm(autoencoder: Autoencoder) -> LatentNorm:
    """The autoencoder's norm.

    Raises:
        UserError: when its latents have no statistics, saying how to compute them.
    """
    if autoencoder.norm is None:
        raise UserError(
            f"autoencoder.norm: {type(autoencoder).__name__} has no latent statistics, so its latents cannot be "
            "diffused; run 'python run.py task=precompute' with the same data and autoencoder (it writes "
            "statistics.safetensors beside the latents), then add latent_norm@autoencoder.norm=file "
            f"{PATH_KEY}=<that file>"
        )
    return autoencoder.norm


_LAYOUTS = {
    ("mean", "std"): Statistics,
    ("latent_mean", "latent_std"): Statistics,
    ("latents_scale", "latents_bias"): ScaleShift,
    ("latents_mean", "latents_std"): Statistics,
}


def _read(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise UserError(
            f"{PATH_KEY}: no file '{file}'; give a .safetensors or .pt with 'mean' and 'std' (task=precompute writes "
            "statistics.safetensors beside the latents), or the config.json of a diffusers autoencoder"
        )
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                provenance = json.loads((opened.metadata() or {}).get("provenance", "{}"))
            return provenance if "latent_mean" in provenance else load_file(file)
        if file.suffix == ".json":
            held = json.loads(file.read_text(encoding="utf-8"))
        else:
            held = read_torch(file)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{PATH_KEY}: '{file}' cannot be read ({first_line(error)}); is it torn?") from error
    if not isinstance(held, Mapping):
        raise UserError(f"{PATH_KEY}: '{file}' holds a {type(held).__name__}, expected values by name")
    return held


def _listed(values: Any) -> list[float]:
    return torch.as_tensor(values, dtype=torch.float32).flatten().tolist()


def _per_channel(values: float | Sequence[float]) -> Float[Tensor, "c 1 1"]:
    listed = [values] if isinstance(values, (int, float)) else list(values)
    return torch.tensor(listed, dtype=torch.float32).reshape(-1, 1, 1)
