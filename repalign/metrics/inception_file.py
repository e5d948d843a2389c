"""Where the weights of the Inception network are; apart from the network, so that a check before heavy work may ask."""

from __future__ import annotations

import os
from pathlib import Path

from repalign.errors import UserError

FILE = "weights-inception-2015-12-05-6726825d.pth"
WANTED = (
    f"expected the path of {FILE} (torch-fidelity release v0.2.0) there or in the environment variable "
    "REPALIGN_INCEPTION; or choose metric=lite0"
)


def find_inception(weights: str | None, key: str = "metric.network.weights") -> Path:
    """The file: the named one, else where torch-fidelity keeps it, ``hub/checkpoints`` of torch's cache.

    Raises:
        UserError: when no file is there.
    """
    # As torch.hub.get_dir() has it, without the seconds that importing torch takes.
    cache = os.environ.get("TORCH_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch"))
    standard = Path(cache).expanduser() / "hub" / "checkpoints" / FILE
    if weights is None and not standard.is_file():
        raise UserError(f"{key}: no Inception weights named, and none at '{standard}'; {WANTED}")
    path = standard if weights is None else Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: no file '{path}'; {WANTED}")
    return path
