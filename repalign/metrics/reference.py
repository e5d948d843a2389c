"""Statistics of the real pictures that generated ones are compared with; measured once, kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from repalign.errors import UserError
from repalign.metrics.features import Features
from repalign.metrics.moments import Moments, root_of
from repalign.random import SampleRandom


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of features, and some of the features themselves.

    Attributes:
        mean: [D], float64.
        covariance: [D, D] with divisor count - 1, float64.
        count: number of pictures.
        features: [K, D] of K pictures chosen at random, for distances that need rows; K = 0 in files of moments alone.
        fingerprint: of the network and the pictures.
        spatial_mean: [S] of spatial features, float64; None when they are not known.
        spatial_covariance: [S, S] of the same.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    count: int
    features: Float[Tensor, "k d"]
    fingerprint: str
    spatial_mean: Float[Tensor, " s"] | None = None
    spatial_covariance: Float[Tensor, "s s"] | None = None
    _roots: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def holds(self) -> frozenset[str]:
        """What a score may ask of it, by the names of :mod:`repalign.metrics.drawn`."""
        features = {"features"} if len(self.features) > 1 else set()
        return frozenset({"pooled"} | features | ({"spatial"} if self.spatial_mean is not None else set()))

    def moments(self, kind: str) -> tuple[Tensor, Tensor]:
        """Mean and covariance of ``pooled`` or ``spatial`` features."""
        if kind == "pooled":
            return self.mean, self.covariance
        assert self.spatial_mean is not None and self.spatial_covariance is not None, "asked of a reference without"
        return self.spatial_mean, self.spatial_covariance

    def root(self, kind: str) -> Float[Tensor, "d d"]:
        """Square root of the covariance, computed once: intervals ask for it again and again."""
        if kind not in self._roots:
            self._roots[kind] = root_of(self.moments(kind)[1])
        return self._roots[kind]

    @classmethod
    def measure(
        cls,
        network: Callable[[Tensor], tuple[Any, ...]],
        batches: Iterable[Tensor],
        fingerprint: str,
        keep: int = 10_000,
    ) -> Reference:
        """Pass every picture through the network once.

        Args:
            network: pictures -> :class:`repalign.metrics.features.Features`, or a tuple that begins like it.
            batches: pictures [B, 3, H, W] in [0, 1].
            fingerprint: written into the file, compared when it is read.
            keep: at most so many feature vectors are kept. Which ones depends on their serial number alone.

        Raises:
            UserError: when there are fewer than two pictures.
        """
        moments: dict[str, Moments] = {}
        count, kept, priority = 0, torch.empty(0), torch.empty(0)
        for images in batches:
            seen = Features(*network(images))
            rows = seen.pooled.detach().cpu()
            for kind, part in (("pooled", rows), ("spatial", seen.spatial)):
                if part is not None:
                    moments[kind] = Moments.of(part) + moments.get(kind, Moments.none(part.shape[1]))
            draw = SampleRandom(0, range(count, count + len(rows))).uniform("reference")
            kept = torch.cat([kept.reshape(-1, rows.shape[1]), rows.float()])
            priority, order = torch.sort(torch.cat([priority, draw]), stable=True)
            kept, priority, count = kept[order][:keep], priority[:keep], count + len(rows)
        if count < 2:
            raise UserError(f"reference: found {count} pictures; statistics need at least 2")
        pooled, spatial = moments["pooled"], moments.get("spatial")
        early = () if spatial is None else (spatial.mean, spatial.covariance)
        return cls(pooled.mean, pooled.covariance, count, kept, fingerprint, *early)

    def save(self, path: Path) -> None:
        """Write a safetensors file that is whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
        tensors = {"mean": self.mean, "covariance": self.covariance, "features": self.features}
        if self.spatial_mean is not None and self.spatial_covariance is not None:
            tensors |= {"spatial_mean": self.spatial_mean, "spatial_covariance": self.spatial_covariance}
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, self._metadata())
        os.replace(partial, path)

    def _metadata(self) -> dict[str, str]:
        return {"count": str(self.count), "fingerprint": self.fingerprint}

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what :meth:`save` wrote, or the moments of an ADM reference batch: .npz with ``mu`` and ``sigma`` of
        Inception's pooled features, perhaps ``mu_s`` and ``sigma_s`` of its spatial ones (width 2023).

        Raises:
            UserError: when the file is missing, torn or of another kind.
        """
        if not path.is_file():
            raise UserError(
                f"reference: no file '{path}'; expected .safetensors of this project or .npz with mu, sigma"
            )
        try:
            return cls._load_moments(path) if path.suffix == ".npz" else cls._load_own(path)
        except (
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            OSError,
            RuntimeError,
            EOFError,
            MemoryError,
            BadZipFile,
        ) as error:
            raise UserError(
                f"reference: '{path}' cannot be read ({error}); expected .safetensors of this project or .npz with "
                "mu, sigma; delete it if it is this project's cache"
            ) from error

    @classmethod
    def _load_own(cls, path: Path) -> Reference:
        with safe_open(path, "pt") as file:
            notes = file.metadata()
            mean, covariance, features = (file.get_tensor(name) for name in ("mean", "covariance", "features"))
            early = [file.get_tensor(name) for name in ("spatial_mean", "spatial_covariance") if name in file.keys()]  # noqa: SIM118
        return cls(mean, covariance, int(notes["count"]), features, notes["fingerprint"], *early)

    @classmethod
    def _load_moments(cls, path: Path) -> Reference:
        with np.load(path, allow_pickle=False) as file:
            names = ("mu", "sigma", *(("mu_s", "sigma_s") if "mu_s" in file.files else ()))
            mean, covariance, *early = (torch.from_numpy(file[name]).double() for name in names)
        # The file does not say how many pictures it stands for; the distance does not depend on the number.
        return cls(mean, covariance, 50_000, torch.empty(0, len(mean)), path.name, *early)
