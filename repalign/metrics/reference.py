"""Statistics of the real pictures that generated ones are compared with; measured once, kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repalign.errors import UserError
from repalign.random import SampleRandom


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of features, and some of the features themselves.

    Attributes:
        mean: [D], float64.
        covariance: [D, D] with divisor count - 1, float64.
        count: number of pictures.
        features: [K, D] of K pictures chosen at random, for kernel distances; K = 0 in files that hold moments alone.
        fingerprint: of the network and the pictures.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    count: int
    features: Float[Tensor, "k d"]
    fingerprint: str

    @classmethod
    def measure(
        cls,
        network: Callable[[Tensor], tuple[Tensor, Tensor]],
        batches: Iterable[Tensor],
        fingerprint: str,
        keep: int = 10_000,
    ) -> Reference:
        """Pass every picture through the network once.

        Args:
            network: pictures -> (features [B, D], logits).
            batches: pictures [B, 3, H, W] in [0, 1].
            fingerprint: written into the file, compared when it is read.
            keep: at most so many feature vectors are kept. Which ones depends on their serial number alone.

        Raises:
            UserError: when there are fewer than two pictures.
        """
        total = outer = torch.zeros((), dtype=torch.float64)
        count, kept, priority = 0, torch.empty(0), torch.empty(0)
        for images in batches:
            rows = network(images)[0].detach().cpu()
            wide = rows.double()
            total, outer = total + wide.sum(0), outer + wide.T @ wide
            draw = SampleRandom(0, range(count, count + len(rows))).uniform("reference")
            kept = torch.cat([kept.reshape(-1, rows.shape[1]), rows.float()])
            priority, order = torch.sort(torch.cat([priority, draw]), stable=True)
            kept, priority, count = kept[order][:keep], priority[:keep], count + len(rows)
        if count < 2:
            raise UserError(f"reference: found {count} pictures; statistics need at least 2")
        mean = total / count
        covariance = (outer - count * torch.outer(mean, mean)) / (count - 1)
        return cls(mean, covariance, count, kept, fingerprint)

    def save(self, path: Path) -> None:
        """Write a safetensors file that is whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
        tensors = {"mean": self.mean, "covariance": self.covariance, "features": self.features}
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, self._metadata())
        os.replace(partial, path)

    def _metadata(self) -> dict[str, str]:
        return {"count": str(self.count), "fingerprint": self.fingerprint}

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what :meth:`save` wrote, or an ADM reference batch (.npz with ``mu`` and ``sigma``, Inception features).

        Raises:
            UserError: when the file is missing, torn or of another kind.
        """
        if not path.is_file():
            raise UserError(
                f"reference: no file '{path}'; expected .safetensors of this project or .npz with mu, sigma"
            )
        try:
            return cls._load_moments(path) if path.suffix == ".npz" else cls._load_own(path)
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(
                f"reference: '{path}' cannot be read ({error}); expected .safetensors of this project or .npz with "
                "mu, sigma; delete it if it is this project's cache"
            ) from error

    @classmethod
    def _load_own(cls, path: Path) -> Reference:
        with safe_open(path, "pt") as file:
            notes = file.metadata()
            mean, covariance, features = (file.get_tensor(name) for name in ("mean", "covariance", "features"))
        return cls(mean, covariance, int(notes["count"]), features, notes["fingerprint"])

    @classmethod
    def _load_moments(cls, path: Path) -> Reference:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
        # The file does not say how many pictures it stands for; the distance does not depend on the number.
        return cls(mean, covariance, 50_000, torch.empty(0, len(mean)), path.name)
