"""Several processes that share one task, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from datamodules.own_store import WHOLE, Share

# One process measures the reference, another draws a shard longer: the others wait.
PATIENCE = timedelta(hours=6)


@contextmanager
def process_group() -> Iterator[Share]:
    """The share of this process, with ``torch.distributed`` running when there is more than one (``WORLD_SIZE``)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield WHOLE
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield Share(dist.get_rank(), world)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def device() -> torch.device:
    """The GPU of this process if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
