"""A latent norm whose statistics follow an autoencoder under training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repalign.autoencoders.latent_norm import ScaleShift
from repalign.errors import UserError
from repalign.nn.batch_norm import batch_norm
from repalign.nn.precision import at_least_float32
from repalign.state import State


class RunningStatistics(nn.Module):
    """Batch normalisation of latents without affine parameters (REPA-E, arXiv:2504.10483, section 3).

    Training mode: normalised = (raw - m_c) / sqrt(v_c + eps), with mean m_c and biased variance v_c of channel c over
    the batch of all ranks and all positions. Each call moves the running statistics by
    running <- (1 - momentum) running + momentum batch, the variance by the unbiased one, as ``nn.BatchNorm2d`` does.
    Evaluation mode: the running statistics take the place of the batch's, and stay.
    Gradients flow through the batch statistics too, those of other ranks included.

    :meth:`denormalize` always uses the running statistics: raw = latent sqrt(running_var) + running_mean. The official
    code leaves eps out there although it normalises with it; ``eps_at_decode`` puts it in, which makes
    :meth:`denormalize` the exact inverse of :meth:`normalize` in evaluation mode.

    The buffers stay in float32 when the module is cast to a half precision, are in the state dict under the names of
    ``nn.BatchNorm2d`` (REPA-E's ``bn.*``), and are averaged by an EMA that covers this module. With several ranks the
    moments are summed over the default group of ``torch.distributed``.

    Args:
        channels: C.
        momentum: of the running statistics, in (0, 1].
        eps: added to the variance.
        initial: where the running statistics begin (mean = bias, variance = 1 / scale^2); None: mean 0, variance 1.
        eps_at_decode: whether :meth:`denormalize` adds eps.

    Raises:
        UserError: when ``initial`` is of another number of channels, or momentum or eps are out of range.
    """

    running_mean: Float[Tensor, " c"]
    running_var: Float[Tensor, " c"]
    num_batches_tracked: Int[Tensor, ""]

    def __init__(
        self,
        channels: int,
        momentum: float = 0.1,
        eps: float = 1e-4,
        initial: ScaleShift | None = None,
        eps_at_decode: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise UserError(f"autoencoder.norm.momentum: expected a number in (0, 1], found {momentum}")
        if eps <= 0:
            raise UserError(f"autoencoder.norm.eps: expected a positive number, found {eps}")
        self.momentum = momentum
        self.eps = eps
        self.eps_at_decode = eps_at_decode
        begin = ScaleShift(1.0) if initial is None else initial
        mean, variance = begin.bias.flatten(), 1 / begin.scale.flatten() ** 2
        for values in (mean, variance):
            if len(values) not in (1, channels):
                raise UserError(
                    f"autoencoder.norm.initial: statistics of {len(values)} channels for a latent of {channels}; "
                    "give the statistics of this autoencoder"
                )
        self.register_buffer("running_mean", mean.expand(channels).clone())
        self.register_buffer("running_var", variance.expand(channels).clone())
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    @property
    def scale(self) -> Float[Tensor, "c 1 1"]:
        """1 / sqrt(running_var): the scale that :meth:`denormalize` undoes."""
        variance = self.running_var + self.eps if self.eps_at_decode else self.running_var
        return variance.rsqrt().reshape(-1, 1, 1)

    @property
    def bias(self) -> Float[Tensor, "c 1 1"]:
        """The running mean."""
        return self.running_mean.reshape(-1, 1, 1)

    def normalize(self, raw: State) -> State:
        """Raw latents [B, C, H, W] -> normalised latents; moves the running statistics in training mode.

        Raises:
            ValueError: in training mode, when a channel has a single value.
        """
        assert isinstance(raw, Tensor), "running statistics are of one stream"
        if self.training:
            self.num_batches_tracked += 1
        statistics = (self.running_mean, self.running_var)
        return batch_norm(at_least_float32(raw), *statistics, self.training, self.momentum, self.eps)

    def denormalize(self, latent: State) -> State:
        """Normalised latents [B, C, H, W] -> raw latents, by the running statistics."""
        assert isinstance(latent, Tensor), "running statistics are of one stream"
        return latent / self.scale + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStatistics:
        """Follow to another device and to float64, but to no half precision: a momentum of 0.1 is lost there."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrower = torch.promote_types(result.dtype, tensor.dtype) != result.dtype
            return tensor.to(result.device) if narrower else result

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        """The options, for ``print(autoencoder)``."""
        return f"{len(self.running_mean)}, momentum={self.momentum}, eps={self.eps}, eps_at_decode={self.eps_at_decode}"
