"""Near duplicates: of pictures whose embeddings are alike, one stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from repalign.curation.neighbours import similar_pairs
from repalign.curation.quality import FORMULAS, measures
from repalign.curation.steps import Candidates, Picture, Verdict
from repalign.encoders.features import resized
from repalign.errors import UserError


class Descriptor(Protocol):
    """One vector per picture: images [B, 3, S, S] in [0, 1] -> a tuple whose first entry is [B, D]."""

    fingerprint: str

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]: ...


class NearDuplicates:
    """Keeps one of every group of pictures whose embeddings have a cosine of ``threshold`` or more.

    Pictures are taken in the order: more pixels, then better quality (:func:`repalign.curation.quality.measures`, to
    three decimals), then smaller name. A picture that no kept one resembles is kept; every picture that resembles it
    goes. So no two kept pictures are near duplicates, chains do not swallow a set, and curating again removes nothing
    (without clusters). A mirrored copy is found because the mirrored picture is embedded too.

    Source: SD3 (arXiv:2403.03206): SSCD embeddings (arXiv:2202.10261), 16,000 clusters, threshold 0.5, the first stays.
    Deviation: the order, the mirrored view, and other embeddings by default, hence another threshold.

    Args:
        network: gives the embedding.
        threshold: cosine in [0, 1]; 0 keeps a single picture of embeddings without negative entries, 1 removes copies
            with the same embedding.
        size: side in pixels that pictures are resampled to for the network; the aspect ratio is not kept.
        clusters: compare within so many clusters; null compares every pair.
        device: of the network.

    Raises:
        UserError: for a threshold outside [0, 1].
    """

    def __init__(
        self, network: Descriptor, threshold: float, size: int = 128, clusters: int | None = None, device: str = "auto"
    ) -> None:
        if not 0 <= threshold <= 1:
            raise UserError(f"task.steps.near_duplicates.threshold: expected a cosine from 0 to 1, found {threshold}")
        if clusters is not None and clusters < 1:
            raise UserError(f"task.steps.near_duplicates.clusters: expected 1 or more or null, found {clusters}")
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.network = network.to(self.device) if isinstance(network, torch.nn.Module) else network
        self.threshold = threshold
        self.size = size
        self.clusters = clusters
        self.fingerprint = f"embedding {network.fingerprint} at {size}, {FORMULAS}"

    @torch.no_grad()
    def measure(self, pictures: Sequence[Picture]) -> Mapping[str, Tensor]:
        """Unit embeddings of the picture and of its mirror image, float16 [B, D] each, and its quality [B]."""
        images = torch.stack([resized(picture[None].float() / 255, self.size)[0] for picture in pictures])
        embedded = [self._embed(view) for view in (images, images.flip(-1))]
        quality = torch.tensor([measures(picture)["quality"] for picture in pictures], dtype=torch.float32)
        return {"plain": embedded[0], "mirrored": embedded[1], "quality": quality}

    def _embed(self, images: Float[Tensor, "b 3 s s"]) -> Tensor:
        return F.normalize(self.network(images.to(self.device))[0].flatten(1).float(), dim=1).half().cpu()

    def judge(self, candidates: Candidates) -> Verdict:
        """All but one of every group."""
        count, held = len(candidates.names), candidates.measured
        plain, mirrored = (F.normalize(torch.from_numpy(held[k]).float(), dim=1) for k in ("plain", "mirrored"))
        one, other, alike = similar_pairs(plain, mirrored, self.threshold, self.clusters)
        pixels = candidates.sizes.astype(np.int64).prod(1)
        # The last key is the first that counts; places are in the order of names already.
        order = np.lexsort((np.arange(count), -np.round(held["quality"].astype(np.float64), 3), -pixels))
        of, to, values = np.concatenate([one, other]), np.concatenate([other, one]), np.concatenate([alike, alike])
        by_picture = np.argsort(of, kind="stable")
        starts = np.searchsorted(of[by_picture], np.arange(count + 1))
        reasons: dict[int, str] = {}
        copy_of: dict[int, int] = {}
        for place in order.tolist():
            if place in reasons:
                continue
            for pair in by_picture[starts[place] : starts[place + 1]].tolist():
                removed = int(to[pair])
                if removed not in reasons:
                    reasons[removed] = f"near duplicate of {candidates.names[place]}, cosine {values[pair]:.4f}"
                    copy_of[removed] = place
        return Verdict(reasons, copy_of)
