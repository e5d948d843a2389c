"""Whether a machine can train: packages, device, arithmetic, memory, disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from omegaconf import DictConfig

from tasks.findings import FINE, LOOK, WRONG, Finding
from tasks.floors import FLOORS
from tasks.record import commit_of, hardware

GIB = 2**30
ROOM = 10  # GiB on a disk below which a training soon stops
SHARED = 1  # GiB of /dev/shm that reading processes hand batches through
# Largest relative error of a product of 512 x 512 matrices whose entries are N(0, 1), by type.
ARITHMETIC = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def packages(cfg: DictConfig) -> Iterator[Finding]:
    """Versions against the floors; run.py has refused what is below one."""
    found = []
    for floor in FLOORS:
        try:
            found.append(f"{floor.package} {version(floor.package)}")
        except PackageNotFoundError:
            continue
    yield Finding("packages", FINE, f"{len(found)} above their security floors: {', '.join(found)}")
    commit = commit_of(Path(__file__).parent)
    yield Finding("code", FINE, f"commit {commit or 'unknown (no checkout of git)'}")


def device(cfg: DictConfig) -> Iterator[Finding]:
    """The device, and what it computes in."""
    yield Finding("device", FINE, f"{hardware()}, {torch.get_num_threads()} threads")
    wanted = str(cfg.trainer.get("accelerator", "auto"))
    cuda = torch.cuda.is_available()
    if wanted in ("gpu", "cuda") and not cuda:
        yield Finding(
            "accelerator", WRONG, f"trainer.accelerator={wanted}, and torch {torch.__version__} sees no GPU",
            "install the driver or a torch built for it, or set trainer=cpu",
        )  # fmt: skip
    place = torch.device("cuda" if cuda else "cpu")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    for dtype, limit in ARITHMETIC.items():
        name = str(dtype).removeprefix("torch.")
        try:
            product = (a.to(place, dtype) @ b.to(place, dtype)).cpu().double()
        except RuntimeError as error:
            yield Finding(
                name, LOOK, f"not on this device ({str(error).splitlines()[0]})", "train in another precision"
            )
            continue
        error = float((product - exact).norm() / exact.norm())
        asked = name.startswith("bf") and str(cfg.trainer.precision).startswith("bf16")
        state = FINE if error < limit else WRONG if asked else LOOK
        yield Finding(
            name, state, f"a matrix product is off by {error:.1e}", f"expected below {limit:.0e}: see the driver"
        )
    cores = os.cpu_count() or 1
    if torch.get_num_threads() > cores:
        yield Finding(
            "threads",
            LOOK,
            f"{torch.get_num_threads()} threads on {cores} cores",
            f"set OMP_NUM_THREADS={cores} or less",
        )


def attention(cfg: DictConfig) -> Iterator[Finding]:
    """The fused kernel computes softmax(q k^T / sqrt d) v."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 64, 32, generator=generator).to(place) for _ in range(3))
    plain = torch.softmax(q @ k.transpose(-1, -2) / 32**0.5, -1) @ v
    error = float((torch.nn.functional.scaled_dot_product_attention(q, k, v) - plain).abs().max())
    state = FINE if error < 1e-2 else WRONG
    yield Finding(
        "attention", state, f"the fused kernel is off by {error:.1e}", "see the versions of torch and the driver"
    )


def disks(cfg: DictConfig) -> Iterator[Finding]:
    """Run folder and cache can be written, and there is room."""
    for name, path in (("run_dir", Path(cfg.run_dir)), ("paths.cache", Path(cfg.paths.cache).expanduser())):
        place = path
        while not place.exists():
            place = place.parent
        try:
            begun = time.perf_counter()
            with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
                file.write(b"\0" * 2**20)
                file.flush()
                os.fsync(file.fileno())
            took = time.perf_counter() - begun
        except OSError as error:
            yield Finding(
                name, WRONG, f"'{place}' cannot be written ({error.strerror})", f"set {name} to a folder that can"
            )
            continue
        free = shutil.disk_usage(place).free / GIB
        found = f"'{place}': {free:.0f} GiB free, 1 MiB on the disk in {1000 * took:.0f} ms"
        yield Finding(name, FINE if free > ROOM else LOOK, found, f"less than {ROOM} GiB: make room, or set {name}")
    shared = Path("/dev/shm")
    if shared.is_dir() and cfg.data.get("num_workers", 0):
        size = shutil.disk_usage(shared).free / GIB
        found = f"{size:.1f} GiB for batches of reading processes"
        yield Finding("/dev/shm", FINE if size > SHARED else LOOK, found, "start the container with --shm-size=8g")


CHECKS = (packages, device, attention, disks)
