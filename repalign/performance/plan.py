"""Memory and time of a training step on many GPUs, from what one step allocates and computes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from repalign.performance.peaks import Gpu

GIB = 2**30
# Bytes of a trained parameter in float32: weight; its gradient; Adam's two moments; the average.
WEIGHT, GRADIENT, MOMENTS, AVERAGE = 4, 4, 8, 4
# Memory traffic per parameter and step: clipping reads the gradient twice; AdamW reads four numbers and writes three;
# the average reads two and writes one.
UPDATE_TRAFFIC = 8 + 28 + 12
CONTEXT = 1.0  # GiB: CUDA's context, NCCL's buffers
FRAGMENTED = 1.05  # of the allocator
PER_MACHINE = 8


@dataclass(frozen=True)
class Footprint:
    """What a step of a recipe is, measured by :mod:`repalign.performance.trace`.

    Attributes:
        parameters: that are trained.
        averaged: that have an average.
        frozen: bytes of weights that are not trained.
        trained_flops: per image, forward and backward of what is trained, without recomputation.
        frozen_flops: per image, of encoders and autoencoder that run in the step.
        per_image: bytes that the step allocates for each image: activations, their gradients.
        fixed: bytes that it allocates whatever the batch, when activations are most: casts of weights.
        least: bytes that it allocates for one image: then gradients of weights are most.
        recomputed: ``per_image`` when every block is checkpointed; None when there are no blocks.
        forward_share: of ``trained_flops``: what recomputation adds.
    """

    parameters: int
    averaged: int
    frozen: int
    trained_flops: float
    frozen_flops: float
    per_image: float
    fixed: float
    least: float
    recomputed: float | None = None
    forward_share: float = 1 / 3


@dataclass(frozen=True)
class Prediction:
    """A step on so many GPUs; memory in GiB per GPU, seconds, dense images per second of all."""

    gpus: int
    batch: float
    memory: float
    fits: bool
    compute: float
    update: float
    exchange: float
    images_per_second: float

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.compute + self.update + self.exchange

    def gpu_hours(self, steps: int) -> float:
        """Of a whole run."""
        return self.seconds * steps * self.gpus / 3600


def memory(print_: Footprint, batch: float, shards: int = 1, recompute: bool = False) -> float:
    """Bytes per GPU at so many images: static parts over ``shards`` (1: DDP), what a step allocates on top.

    static = (4 + 8) P + 4 P_average + frozen; step = max(fixed + per_image x batch, least): activations go while the
    gradients 4 P, which ``least`` holds, come.
    """
    static = (WEIGHT + MOMENTS) * print_.parameters + AVERAGE * print_.averaged
    gradients = min(GRADIENT * print_.parameters, print_.least)
    each = print_.recomputed if recompute and print_.recomputed is not None else print_.per_image
    step = max(print_.fixed + each * batch, print_.least - gradients + gradients / shards)
    return static / shards + print_.frozen + step


def exchange_seconds(parameters: int, gpus: int, link: float, network: float) -> float:
    """A ring's all-reduce of float32 gradients: 2 (n - 1) / n x 4 P bytes at the slowest link's GB/s, one way.

    Sharded training moves as much: two gathers of weights in half precision and one scatter of gradients.
    """
    if gpus == 1:
        return 0.0
    slowest = link if gpus <= PER_MACHINE else min(link, network)
    return 2 * (gpus - 1) / gpus * GRADIENT * parameters / (slowest * 1e9)


def predict(
    print_: Footprint,
    gpu: Gpu,
    gpus: int,
    global_batch: int,
    *,
    mfu: float,
    arithmetic: str,
    network: float = 50.0,
    sharded: bool = False,
    recompute: bool = False,
    accumulate: int = 1,
) -> Prediction:
    """A step of a global batch.

        compute = (trained + frozen FLOPs) x images per GPU / (mfu x peak); recomputation adds the forward pass
        update = 48 bytes x P / memory bandwidth (sharded: / n)
        exchange = max(0, all-reduce - the backward pass, under which it hides)

    Args:
        print_: of the recipe.
        gpu: on paper.
        gpus: number of them, 8 to a machine.
        global_batch: images of a step.
        mfu: share of the peak that is reached: measured by task=benchmark, or supposed.
        arithmetic: of the matrix products, a key of ``gpu.peak``.
        network: GB/s that a GPU sends to other machines.
        sharded: weights, gradients, moments and average over all GPUs (FSDP).
        recompute: activations of blocks.
        accumulate: micro-batches per step.
    """
    images = global_batch / gpus
    shards = gpus if sharded else 1
    taken = memory(print_, math.ceil(images / accumulate), shards, recompute) / GIB * FRAGMENTED + CONTEXT
    extra = print_.forward_share * print_.trained_flops if recompute else 0.0
    speed = mfu * gpu.peak[arithmetic] * 1e12
    compute = (print_.trained_flops + extra + print_.frozen_flops) * images / speed
    backward = (1 - print_.forward_share) * print_.trained_flops * images / speed
    update = UPDATE_TRAFFIC * print_.parameters / shards / (gpu.bandwidth * 1e12)
    exchange = max(0.0, exchange_seconds(print_.parameters, gpus, gpu.link, network) - backward)
    whole = compute + update + exchange
    return Prediction(gpus, images, taken, taken <= gpu.memory, compute, update, exchange, global_batch / whole)
