"""task=reconstruct: how well an autoencoder restores the data set's pictures."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from callbacks.pictures import save_png
from callbacks.reconstruction_grid import reconstruction_grid
from callbacks.reconstruction_scores import in_words, score_reconstructions
from repalign.errors import UserError
from tasks.evaluate import write_evaluation
from tasks.instantiate import build, check_targets
from tasks.record import commit_of, hardware
from tasks.sample import device


@torch.no_grad()
def run(cfg: DictConfig) -> None:
    """Write ``reconstruction.json`` and ``reconstruction.png`` into the run folder.

    Raises:
        UserError: one line for missing weights or pictures, or an autoencoder without weights.
    """
    check_targets(cfg)
    if cfg.metric is None:
        raise UserError("metric: none chosen; set metric=lite0 or metric=inception")
    task, run_dir = cfg.task, Path(cfg.run_dir)
    data = build(cfg.data, "data")
    autoencoder = build(cfg.autoencoder, "autoencoder")
    if not isinstance(autoencoder, torch.nn.Module) or not any(True for _ in autoencoder.parameters()):
        raise UserError(f"autoencoder: {type(autoencoder).__name__} restores pictures as they are; choose another one")
    autoencoder.to(device()).eval()
    data.setup("fit")
    values = score_reconstructions(
        autoencoder,
        data,
        build(cfg.metric, "metric"),
        Path(cfg.paths.cache),
        task.num_samples,
        build(task.perceptual, "task.perceptual") if task.perceptual else None,
        task.batch_size,
    )
    save_png(reconstruction_grid(autoencoder, data, task.columns, task.rows), run_dir / "reconstruction.png")
    result = {
        "metrics": values,
        "num_samples": min(task.num_samples, len(data.dataset)),
        "autoencoder": autoencoder.fingerprint,
        "data": data.fingerprint,
        "licence": data.attribution,
        "date": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "commit": commit_of(Path(__file__).parent),
        "hardware": hardware(),
    }
    write_evaluation(result, run_dir / "reconstruction.json")
    print(f"{in_words(values)} | {result['num_samples']} pictures; wrote {run_dir}", flush=True)
