"""REPA-E's latents: one HDF5 file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.layouts.latent_files import LatentFiles, Row, labels_from_json
from datamodules.layouts.repa import LABELS, split
from datamodules.packages import need
from datamodules.store import DamagedStore
from repalign.errors import UserError


class REPAELatents(LatentFiles):
    """A file such as ``repae-invae-400k.h5`` that REPA-E's ``cache_latents`` wrote, rows in alphabetical order.

    The arrays ``00000/img-mean-std-00000000.npy`` [2C, h, w] are mean and standard deviation, and ``dataset.json``
    inside, as text, the labels: REPA's folder in one file. Source: Leng et al., arXiv:2504.10483, official code.

    Args:
        root: the .h5 file.
        num_classes, key: see :class:`datamodules.layouts.latent_files.LatentFiles`.

    Raises:
        UserError: when the file or its labels are missing, or the number of arrays is another than that of labels.
    """

    def __init__(self, root: str | Path | None, num_classes: int | None = None, key: str = "data.root") -> None:
        super().__init__(root, num_classes, key)
        if self.root.is_dir():
            held = ", ".join(sorted(path.name for path in self.root.glob("*.h5"))) or "no .h5 file"
            raise UserError(f"{key}: '{root}' is a folder, expected one .h5 file of latents; it holds {held}")
        self._file: Any = None
        self._process = os.getpid()
        if LABELS not in self._opened():
            raise UserError(f"{key}: '{root}' has no '{LABELS}'; expected a file that REPA-E's cache_latents wrote")
        text = np.asarray(self._opened()[LABELS]).tobytes()
        labels = labels_from_json(text, key, f"'{LABELS}' in '{root}'")
        # Numbers of members, because looking up a million names takes a minute.
        groups = [part for part in self._opened().values() if hasattr(part, "keys")]
        found = sum(len(group) for group in groups) + len(self._opened()) - len(groups) - 1
        if found != len(labels):
            raise UserError(f"{key}: found {found} arrays in '{root}', but its {LABELS} lists {len(labels)}")
        self.names = sorted(labels)
        self.number_classes([labels[name] for name in self.names])
        self.statistics = next(iter(sorted(self.root.parent.glob(f"{self.root.stem}*stats.pt"))), None)
        self.look()
        self._close()

    def place(self, row: int) -> str:
        """File and name in it."""
        return f"'{self.names[row]}' in '{self.root}'"

    def read(self, row: int) -> Row:
        """Mean and standard deviation."""
        try:
            moments = self._opened()[self.names[row]][()]
        except (OSError, KeyError) as error:
            raise DamagedStore(f"{self.key}: cannot read {self.place(row)} ({error}); copy the file again") from error
        return split(np.asarray(moments), self.key, self.place(row))

    def _opened(self) -> Any:
        if self._file is None or self._process != os.getpid():  # an open HDF5 file does not survive a fork
            try:
                self._file = need("h5py", "data=latents_repa_e", "data").File(self.root, "r", locking=False)
            except OSError as error:
                raise DamagedStore(f"{self.key}: '{self.root}' is no HDF5 file, or torn ({error})") from error
            self._process = os.getpid()
        return self._file

    def _close(self) -> None:
        self._file.close()
        self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}
