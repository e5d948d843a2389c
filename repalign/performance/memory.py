"""The most memory that something takes."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak bytes since this was made: of the allocator on a GPU, of the process (resident set) on a CPU.

    Attributes:
        how: what is measured, in words.
        before: bytes that were taken already.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.how = "allocated on the device"
            self.before = torch.cuda.memory_allocated(device)
            return
        try:
            _CLEAR.write_text("5")  # Linux: the peak begins anew
            self.how = "resident set of the process"
        except OSError:
            self.how = "resident set of the process since it began"
        self.before = _resident("VmRSS")

    def read(self) -> int:
        """The peak so far."""
        return peak_bytes(self._device)


def peak_bytes(device: torch.device) -> int:
    """The peak since the process began, or since a :class:`PeakMemory` was made."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    if _STATUS.is_file():
        found = re.search(rf"{name}:\s+(\d+) kB", _STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
