"""Between raw latents (what an autoencoder returns) and normalised latents (what is diffused).

A norm is part of the autoencoder, so that whoever decodes cannot use another one than whoever encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.state import State, map_state


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

    @classmethod
    def from_file(cls, path: str | Path) -> Statistics:
        """Read ``mean`` and ``std`` (any shape with C elements) from a .safetensors or a .pt file of tensors.

        Raises:
            UserError: when the file is missing or lacks one of the two.
        """
        file = Path(path)
        if not file.is_file():
            raise UserError(
                f"autoencoder.norm.path: no file '{file}'; give a .safetensors or .pt with 'mean' and 'std'"
            )
        held: Mapping[str, Tensor] = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        for name in ("mean", "std"):
            if name not in held:
                raise UserError(f"autoencoder.norm.path: '{file}' has no '{name}'; it holds {', '.join(held)}")
        return cls(held["mean"].flatten().tolist(), held["std"].flatten().tolist())


def _per_channel(values: float | Sequence[float]) -> Float[Tensor, "c 1 1"]:
    listed = [values] if isinstance(values, (int, float)) else list(values)
    return torch.tensor(listed, dtype=torch.float32).reshape(-1, 1, 1)
