"""Batch normalisation over the batch of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def batch_norm(
    x: Float[Tensor, "b c h w"],
    running_mean: Float[Tensor, " c"],
    running_var: Float[Tensor, " c"],
    training: bool,
    momentum: float,
    eps: float,
) -> Float[Tensor, "b c h w"]:
    """(x - m_c) / sqrt(v_c + eps) (arXiv:1502.03167, without affine parameters).

    In training, mean and biased variance of channel c are those of the batch of all ranks of the default group and of
    all positions, gradients flow through them to every rank, and the running statistics move by
    running <- (1 - momentum) running + momentum batch, the variance by the unbiased one. Otherwise the running
    statistics take their place.

    Raises:
        ValueError: in training, when a channel has a single value.
    """
    if not training or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
    # nn.SyncBatchNorm would do, but refuses the CPU. Double precision, because E[x^2] - E[x]^2 cancels.
    wide = x.double()
    sums = wide.sum((0, 2, 3)), (wide**2).sum((0, 2, 3))
    each = x.numel() // x.shape[1]
    if each * dist.get_world_size() < 2:  # counted here: reading the sum below would make every step wait for it
        raise ValueError("a batch of one value per channel has no variance")
    count = torch.full_like(sums[0], each)
    total, squares, number = _SumOverRanks.apply(torch.stack([*sums, count]))  # pyright: ignore[reportGeneralTypeIssues]
    mean = total / number
    variance = squares / number - mean**2
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        unbiased = variance * number / (number - 1)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    mean, variance = mean.to(x.dtype).reshape(-1, 1, 1), variance.to(x.dtype).reshape(-1, 1, 1)
    return (x - mean) * (variance + eps).rsqrt()


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose batch is that of all processes (:func:`batch_norm`); the same keys, and alone the same.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:  # noqa: A002  (the base class's name)
        """[B, C, H, W] -> normalised, times weight plus bias, each [C]."""
        if self.training:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        normal = batch_norm(input, self.running_mean, self.running_var, self.training, self.momentum, self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of the default group; the gradient of every rank's sum comes back to every rank."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total
