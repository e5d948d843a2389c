"""DDT's latents: one .pt file per picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from datamodules.image_folder import files_by_class
from datamodules.layouts.latent_files import LatentFiles, Row
from datamodules.store import DamagedStore
from repalign.autoencoders.posterior import from_log_variance
from repalign.reading import read_torch


class DDTLatents(LatentFiles):
    """A folder such as ``train_256_latent`` of DDT: the tree of ImageNet, a file ``PICTURE.JPEG.pt`` for each picture.

    A file holds ``mean`` and ``logvar`` [C, h, w] (float32, or float16 at 512 px); std = exp(0.5 clamp(logvar, -30,
    20)), see :func:`repalign.autoencoders.posterior.from_log_variance`. Classes are the sub-folders in alphabetical
    order. Files are read with ``weights_only=True``. Source: Wang et al., arXiv:2504.05741, official code.

    Args:
        root: the folder.
        num_classes, key: see :class:`datamodules.layouts.latent_files.LatentFiles`.

    Raises:
        UserError: when there are no class folders, or one without files.
    """

    def __init__(self, root: str | Path | None, num_classes: int | None = None, key: str = "data.root") -> None:
        super().__init__(root, num_classes, key)
        self.names, labels, names = files_by_class(self.root, (".pt",))
        self.name_classes(labels, names)
        self.look()

    def place(self, row: int) -> str:
        """The path of the file."""
        return f"'{self.root / self.names[row]}'"

    def read(self, row: int) -> Row:
        """Mean and standard deviation."""
        try:
            held = read_torch(self.root / self.names[row])
        except (OSError, RuntimeError) as error:
            raise DamagedStore(
                f"{self.key}: cannot read {self.place(row)} ({type(error).__name__}); restore the file"
            ) from error
        if not (isinstance(held, dict) and all(isinstance(held.get(name), Tensor) for name in ("mean", "logvar"))):
            found = ", ".join(map(str, held)) if isinstance(held, dict) else type(held).__name__
            raise DamagedStore(f"{self.key}: {self.place(row)} holds {found}, expected tensors 'mean' and 'logvar'")
        mean, log_variance = held["mean"].float(), held["logvar"].float()
        if mean.shape != log_variance.shape:
            raise DamagedStore(
                f"{self.key}: {self.place(row)} has mean {tuple(mean.shape)}, logvar {tuple(log_variance.shape)}"
            )
        posterior = from_log_variance(torch.cat([mean, log_variance])[None])
        assert isinstance(posterior.mean, Tensor) and isinstance(posterior.std, Tensor)
        return posterior.mean[0].numpy(), posterior.std[0].numpy()
