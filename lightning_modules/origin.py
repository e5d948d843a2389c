"""Where weights come from: what a file of an autoencoder says of its training."""

from __future__ import annotations

import json
import time
from typing import Any

from lightning_modules.base import RunModule


def origin_of(module: RunModule, data: Any) -> dict[str, Any]:
    """Data, licence, length, commit, machine and date of a training, as plain values.

    Args:
        module: at its last step.
        data: its data module.
    """
    record = module.run_dir / "run.json"
    run = json.loads(record.read_text()) if record.is_file() else {}
    return {
        "data": type(data).__name__,
        "image_size": data.image_size,
        "data_fingerprint": data.fingerprint,
        "licence": data.attribution,
        "steps": module.progress.step,
        "batch_size": data.batch_size,
        "seed": module.seed,
        "commit": run.get("commit"),
        "hardware": run.get("hardware"),
        "versions": run.get("versions"),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
