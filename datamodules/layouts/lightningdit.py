"""LightningDiT's latents: safetensors shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from datamodules.layouts.latent_files import LatentFiles, Row
from datamodules.store import DamagedStore
from repalign.errors import UserError

STATISTICS = "latents_stats.pt"


class LightningDiTLatents(LatentFiles):
    """A folder that LightningDiT's ``extract_features`` wrote, rows in the order of file names.

    ``latents_rank00_shard000.safetensors``, ... hold ``latents`` [n, C, h, w], samples of the posterior drawn once;
    ``latents_flip``, those of the mirrored pictures; ``labels`` [n]. ``latents_stats.pt`` beside them has ``mean`` and
    ``std`` per channel. LightningDiT takes either view with probability 1/2: data.horizontal_flip=true.
    Source: Yao et al., arXiv:2501.01423, official code.

    Args:
        root: the folder.
        num_classes, key: see :class:`datamodules.layouts.latent_files.LatentFiles`.

    Raises:
        UserError: when shards or their arrays are missing, or differ in shape or number.
    """

    def __init__(self, root: str | Path | None, num_classes: int | None = None, key: str = "data.root") -> None:
        super().__init__(root, num_classes, key)
        self.shards = sorted(self.root.glob("*.safetensors"))
        if not self.shards:
            raise UserError(f"{key}: no .safetensors in '{root}'; expected the folder of LightningDiT's latents")
        self._files: dict[Path, Any] = {}
        self._process = os.getpid()
        parts = [self._labels(path) for path in self.shards]
        self._ends = np.cumsum([len(labels) for labels, _ in parts], dtype=np.int64)
        self.number_classes(np.concatenate([labels for labels, _ in parts]))
        self.has_views = all(flipped for _, flipped in parts)
        self.statistics = self.root / STATISTICS if (self.root / STATISTICS).is_file() else None
        self.look()
        self._files = {}

    def place(self, row: int) -> str:
        """Shard, array and row in it."""
        shard, inside = self._locate(row % len(self))
        return f"'{'latents_flip' if row >= len(self) else 'latents'}' of '{self.shards[shard]}', row {inside}"

    def read(self, row: int) -> Row:
        """The sample; rows from N on are of mirrored pictures."""
        shard, inside = self._locate(row % len(self))
        name = "latents_flip" if row >= len(self) else "latents"
        latent = self._opened(self.shards[shard]).get_slice(name)[inside : inside + 1]
        return latent[0].float().numpy(), None

    def _locate(self, row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, int(row - (self._ends[shard - 1] if shard else 0))

    def _labels(self, path: Path) -> tuple[np.ndarray, bool]:
        file = self._opened(path)
        held = list(file.keys())
        for name in ("latents", "labels"):
            if name not in held:
                raise UserError(f"{self.key}: '{path}' has no '{name}'; it holds {', '.join(held)}")
        labels = file.get_tensor("labels").numpy()
        views = [name for name in ("latents", "latents_flip") if name in held]
        for name in views:
            rows = file.get_slice(name).get_shape()[0]
            if labels.ndim != 1 or rows != len(labels):
                raise DamagedStore(f"{self.key}: '{path}' has {rows} {name} but labels of shape {labels.shape}")
        return labels, len(views) == 2

    def _opened(self, path: Path) -> Any:
        if self._process != os.getpid():
            self._files, self._process = {}, os.getpid()
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DamagedStore(f"{self.key}: cannot read '{path}' ({error}); copy it again") from error
        return self._files[path]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}
