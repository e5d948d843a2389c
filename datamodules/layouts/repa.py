"""REPA's latents: one .npy file per picture."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from datamodules.layouts.latent_files import LatentFiles, Row, labels_from_json
from datamodules.store import DamagedStore
from repalign.errors import UserError

LABELS = "dataset.json"


def split(moments: np.ndarray, key: str, place: str) -> Row:
    """[2 C, h, w] -> mean and standard deviation [C, h, w].

    Raises:
        DamagedStore: for another shape or type.
    """
    if moments.ndim != 3 or moments.shape[0] % 2 or not np.issubdtype(moments.dtype, np.floating):
        raise DamagedStore(
            f"{key}: {place} is {moments.dtype} {moments.shape}, expected floats [2C, h, w], mean and std"
        )
    mean, std = np.split(moments, 2)
    return mean, std


class REPALatents(LatentFiles):
    """The folder ``vae-sd`` of REPA's preparation, rows in alphabetical order of the files.

    ``00000/img-mean-std-00000000.npy`` holds float32 [2C, h, w], mean and standard deviation (not its logarithm);
    ``dataset.json`` the labels. Source: Yu et al., arXiv:2410.06940, official preparation.

    Args:
        root: that folder.
        num_classes, key: see :class:`datamodules.layouts.latent_files.LatentFiles`.

    Raises:
        UserError: when files or labels are missing, or do not belong together.
    """

    def __init__(self, root: str | Path | None, num_classes: int | None = None, key: str = "data.root") -> None:
        super().__init__(root, num_classes, key)
        if not (self.root / LABELS).is_file():
            raise UserError(f"{key}: no '{self.root / LABELS}'; expected REPA's folder vae-sd with its labels")
        labels = labels_from_json((self.root / LABELS).read_bytes(), key, f"'{self.root / LABELS}'")
        found = {
            os.path.relpath(os.path.join(folder, file), self.root).replace(os.sep, "/")
            for folder, _, inside in os.walk(self.root)
            for file in inside
            if file.endswith(".npy")
        }
        if missing := sorted(labels.keys() - found):
            raise UserError(
                f"{key}: found {len(found)} .npy files in '{self.root}', but {LABELS} lists {len(labels)}; the first "
                f"that is missing is '{missing[0]}'"
            )
        if unlabelled := sorted(found - labels.keys()):
            raise UserError(
                f"{key}: '{self.root / LABELS}' has no label for {len(unlabelled)} of {len(found)} files, the first is "
                f"'{unlabelled[0]}'"
            )
        self.names = sorted(found)
        self.number_classes([labels[name] for name in self.names])
        self.look()

    def place(self, row: int) -> str:
        """The path of the file."""
        return f"'{self.root / self.names[row]}'"

    def read(self, row: int) -> Row:
        """Mean and standard deviation."""
        try:
            moments = np.load(self.root / self.names[row], allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedStore(f"{self.key}: cannot read {self.place(row)} ({error}); restore the file") from error
        return split(moments, self.key, self.place(row))
