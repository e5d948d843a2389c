"""A latent norm that the first batch of a training decides."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repalign.state import State


class FirstBatchScale(nn.Module):
    """normalised = raw / std, with the standard deviation of all entries of the first training batch (LDM, appendix G).

    LDM's ``scale_by_std``: one number for all channels, no shift. Measured at the first call in training mode, over all
    ranks, and kept in the checkpoint; until then it is 1. The sum of squares is divided by the count less one.
    """

    scale: Float[Tensor, ""]
    known: Bool[Tensor, ""]

    def __init__(self) -> None:
        super().__init__()
        self._read = False  # whether `known` was: a look at every step would make the step wait for its device
        self.register_load_state_dict_post_hook(lambda norm, _: setattr(norm, "_read", False))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("known", torch.tensor(False))
        self.register_buffer("bias", torch.tensor(0.0), persistent=False)  # as every norm of one factor has it

    def normalize(self, raw: State) -> State:
        """Raw latents [B, C, H, W] -> normalised latents; measures at its first call in training mode."""
        assert isinstance(raw, Tensor), "the scale is of one stream"
        if self.training and not self._read:
            if not self.known:
                self._measure(raw.detach().double())
            self._read = True
        return raw * self.scale

    def denormalize(self, latent: State) -> State:
        """Normalised latents [B, C, H, W] -> raw latents."""
        assert isinstance(latent, Tensor), "the scale is of one stream"
        return latent / self.scale

    def _measure(self, raw: Tensor) -> None:
        moments = torch.stack([torch.ones_like(raw).sum(), raw.sum(), (raw**2).sum()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments)
        count, total, squares = moments
        variance = (squares - total**2 / count) / (count - 1)
        self.scale.copy_(variance.rsqrt())
        self.known.fill_(True)
