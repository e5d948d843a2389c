"""The arithmetic a device can do at best: from its maker's data sheet, or measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper.

    Attributes:
        peak: dense TFLOP/s by arithmetic: bfloat16 (float16 is the same), tf32, float32.
        memory: GiB that a process can use.
        bandwidth: of the memory, TB/s.
        link: GB/s that a GPU sends to the others of its machine, one way.
        source: where these numbers stand.
    """

    peak: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float
    source: str


def _gpu(bf16: float, tf32: float, fp32: float, memory: float, bandwidth: float, link: float, source: str) -> Gpu:
    return Gpu({"bfloat16": bf16, "tf32": tf32, "float32": fp32}, memory, bandwidth, link, source)


# The longest key whose words stand in the device's name counts. Figures with sparsity on a data sheet are halved here.
GPUS = {
    "b200": _gpu(2250, 1125, 75, 178, 8.0, 900, "NVIDIA DGX B200 data sheet"),
    "h200": _gpu(989, 494, 67, 139, 4.8, 450, "NVIDIA H200 data sheet, SXM"),
    "h100": _gpu(989, 494, 67, 79, 3.35, 450, "NVIDIA H100 data sheet, SXM"),
    "h100 pcie": _gpu(756, 378, 51, 79, 2.0, 64, "NVIDIA H100 data sheet, PCIe"),
    "h100 nvl": _gpu(835, 417, 60, 93, 3.9, 300, "NVIDIA H100 data sheet, NVL"),
    "h800": _gpu(989, 494, 67, 79, 3.35, 200, "NVIDIA H100 data sheet, SXM; link of the H800"),
    "a100": _gpu(312, 156, 19.5, 79, 2.0, 300, "NVIDIA A100 data sheet, 80 GB SXM"),
    "a100-sxm4-40gb": _gpu(312, 156, 19.5, 39, 1.55, 300, "NVIDIA A100 data sheet, 40 GB SXM"),
    "l40s": _gpu(362, 183, 91.6, 44, 0.86, 32, "NVIDIA L40S data sheet"),
    "a10": _gpu(125, 62.5, 31.2, 22, 0.6, 32, "NVIDIA A10 data sheet"),
    "4090": _gpu(165, 82.6, 82.6, 23, 1.0, 32, "NVIDIA Ada architecture paper, float32 accumulation"),
}  # fmt: skip


def gpu_named(name: str) -> Gpu | None:
    """The entry for a device's name as its driver says it ('NVIDIA H100 80GB HBM3'); None for one that is not here."""
    words = f" {name.lower()} ".replace("-", " ")
    key = max((key for key in GPUS if f" {key} ".replace("-", " ") in words), key=len, default=None)
    return None if key is None else GPUS[key]


def peak_of(device: torch.device, arithmetic: str, now: Callable[[], float] = time.perf_counter) -> tuple[float, str]:
    """FLOP/s that a device can do at best, and where the number is from; unknown devices are measured.

    Args:
        device: a GPU or the CPU.
        arithmetic: 'bfloat16', 'float16', 'tf32' or 'float32'.
        now: clock of a measurement, the same as that of what is compared with the peak.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = gpu_named(name)
        key = "bfloat16" if arithmetic == "float16" else arithmetic
        if known is not None:
            return known.peak[key] * 1e12, known.source
    flops, size = measured_peak(device, arithmetic, now=now)
    return flops, f"measured: product of {size} x {size} matrices, {arithmetic}"


def measured_peak(
    device: torch.device,
    arithmetic: str,
    size: int | None = None,
    rounds: int = 40,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[float, int]:
    """FLOP/s of the best of some products of square matrices, and their side."""
    size = size or (8192 if device.type == "cuda" else 512)  # short on a CPU: others may run on it
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(arithmetic, torch.float32)
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(rounds + 1):
        _wait(device)
        start = now()
        torch.mm(a, b)
        _wait(device)
        best = min(best, now() - start)
    return 2 * size**3 / best, size


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
