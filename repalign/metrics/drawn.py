"""What the scores read of the generated pictures: moments and rows of features, from any batches and processes."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from repalign.errors import UserError
from repalign.metrics.features import Features
from repalign.metrics.moments import Moments

# What a score may need -> where it is in Features: moments of a kind, or the rows themselves.
MOMENTS = {"pooled": "pooled", "spatial": "spatial"}
ROWS = {"features": "pooled", "logits": "logits", "text": "text"}


class Drawn:
    """Statistics of the generated pictures, by serial number.

    Moments are kept per group (serial number modulo ``groups``), rows with their serial numbers: so neither the cutting
    into batches nor the number of processes changes anything but the order of float64 sums.

    Args:
        needs: names in ``MOMENTS`` and ``ROWS``.
        groups: number of groups; 1 when no part of the pictures is asked for.
    """

    def __init__(self, needs: Collection[str], groups: int = 1) -> None:
        self.needs = frozenset(needs)
        self.groups = groups
        self._moments: dict[str, list[Moments]] = {}
        self._rows: dict[str, list[Tensor]] = {need: [] for need in ROWS if need in self.needs}
        self._serials: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of pictures."""
        return sum(map(len, self._serials))

    @property
    def serials(self) -> Int[Tensor, " n"]:
        """Serial numbers, rising."""
        return self._all(self._serials).sort().values

    def add(self, serials: Int[Tensor, " b"], seen: Features) -> None:
        """Take a batch in.

        Raises:
            UserError: when the network gives less than the scores need.
        """
        for need in sorted(self.needs):
            part = getattr(seen, {**MOMENTS, **ROWS}[need])
            if part is None:
                raise UserError(f"metric: the network gives no {need}, which one of metric.scores needs; leave it out")
            rows = part.detach().cpu()
            if need in ROWS:
                self._rows[need].append(rows.float())
                continue
            own = self._moments.setdefault(need, [Moments.none(rows.shape[1])] * self.groups)
            for group in (serials % self.groups).unique().tolist():
                own[group] = own[group] + Moments.of(rows[serials % self.groups == group])
        self._serials.append(serials)

    def moments(self, kind: str) -> Moments:
        """Of all pictures.

        Raises:
            UserError: when a feature was not finite, or there are fewer than two pictures.
        """
        if self.count < 2:
            raise UserError(f"num_samples: a Frechet distance needs at least 2 generated pictures, found {self.count}")
        first, *others = self._moments[kind]
        merged = sum(others, first)
        if not merged.total.isfinite().all():
            raise UserError("metric: the features of the generated pictures are not finite")
        return merged

    def rows(self, kind: str) -> Float[Tensor, "n d"]:
        """Features or logits in the order of the serial numbers, float32."""
        return torch.cat(self._rows[kind])[self._all(self._serials).argsort(stable=True)]

    def part(self, groups: Collection[int]) -> Drawn:
        """The pictures of some groups alone."""
        part = Drawn(self.needs, 1)
        for kind, own in self._moments.items():
            first, *others = (own[group] for group in groups)
            part._moments[kind] = [sum(others, first)]
        kept = torch.isin(self.serials % self.groups, torch.tensor(sorted(groups)))
        part._rows = {kind: [self.rows(kind)[kept]] for kind in self._rows}
        part._serials = [self.serials[kept]]
        return part

    def gather(self, device: torch.device) -> None:
        """Bring together what the processes of ``torch.distributed`` hold; every one of them must call it.

        Args:
            device: where tensors can be exchanged: the GPU for NCCL.
        """
        for kind in sorted(self.needs & MOMENTS.keys()):
            own = self._moments.get(kind)
            dim = int(_reduced(torch.tensor(0 if own is None else len(own[0].total)), device, dist.ReduceOp.MAX))
            own = [Moments.none(dim)] * self.groups if own is None else own
            self._moments[kind] = [
                Moments(_reduced(m.count, device), _reduced(m.total, device), _reduced(m.outer, device)) for m in own
            ]
        for kind, rows in self._rows.items():
            self._rows[kind] = [_gathered(torch.cat(rows) if rows else torch.empty(0, 0), device)]
        self._serials = [_gathered(self._all(self._serials)[:, None], device)[:, 0].long()]

    @staticmethod
    def _all(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _reduced(value: Tensor, device: torch.device, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    moved = value.to(device, copy=True)
    dist.all_reduce(moved, operation)
    return moved.cpu()


def _gathered(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of all processes, one after another; their numbers differ, so the shorter ones are padded on the way."""
    sizes = [torch.zeros(2, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(rows.shape, device=device))
    longest, widest = torch.stack(sizes).amax(0).tolist()
    padded = torch.zeros(longest, widest, dtype=rows.dtype, device=device)
    padded[: len(rows), : rows.shape[1]] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: size[0]].cpu() for part, size in zip(parts, sizes, strict=True)])
