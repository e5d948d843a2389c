"""Pictures of mixed aspect ratios: every batch has one height and width."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from datamodules.sampler import check_batch, epoch_order, micro_batches
from repalign.errors import UserError

_PLAN = 0x6275636B  # keeps the order of buckets apart from the order of pictures


def bucket_sides(image_size: int, step: int, ratio: float) -> list[tuple[int, int]]:
    """Heights and widths, multiples of ``step``, whose product is at most image_size^2; the square first.

    For each width the largest height, as far as the longer side over the shorter is at most ``ratio`` (NovelAI's and
    SDXL's bucketing, step 64).

    Raises:
        UserError: when the step does not divide the image size, or the ratio is below 1.
    """
    if step < 1 or image_size % step:
        raise UserError(f"data.bucket_step: {step} does not divide data.image_size={image_size}")
    if ratio < 1:
        raise UserError(f"data.bucket_ratio: expected 1 or more, found {ratio}")
    found = set()
    for width in range(step, int(image_size * ratio) + 1, step):
        height = image_size**2 // width // step * step
        for sides in ((height, width), (width, height)):
            if height and max(sides) <= ratio * min(sides):
                found.add(sides)
    return sorted(found, key=lambda sides: (abs(np.log(sides[0] / sides[1])), sides))


class Buckets:
    """Which bucket every picture belongs to: the one whose aspect ratio is nearest, on a logarithmic scale.

    Args:
        sizes: original height and width of every picture, [N, 2].
        sides: height and width of every bucket.

    Attributes:
        of: number of the bucket of every picture, int64 [N].
        sides: as given.
    """

    def __init__(self, sizes: np.ndarray, sides: Sequence[tuple[int, int]]) -> None:
        self.sides = list(sides)
        ratios = np.log([height / width for height, width in sides])
        self.of = np.abs(np.log(sizes[:, 0] / sizes[:, 1])[:, None] - ratios).argmin(1).astype(np.int64)
        self._members = [np.flatnonzero(self.of == number) for number in range(len(self.sides))]

    def members(self, number: int) -> np.ndarray:
        """The pictures of a bucket, in order."""
        return self._members[number]

    def sides_of(self, index: int) -> tuple[int, int]:
        """Height and width to which a picture is cut."""
        return self.sides[int(self.of[index])]

    def after(self, index: int, offset: int) -> int:
        """The picture ``offset`` places further in the same bucket, round and round."""
        members = self._members[int(self.of[index])]
        return int(members[(int(np.searchsorted(members, index)) + offset) % len(members)])


class BucketBatchSampler(Sampler[np.ndarray]):
    """Micro-batches of (serial number, index), int64 [B, 2], for one rank, without end; every step is of one bucket.

    Each bucket is an endless stream of permutations, of which its batches are consecutive pieces: in each run of N_b
    places that begins at a multiple of N_b every picture of the bucket occurs once, so none is lost and none is
    repeated early. By the end of epoch e (from 0) bucket b has had floor((e + 1) N_b / B) batches: what is left over
    begins the next epoch. Within an epoch the batches of all buckets are shuffled. All is a function of (seed, step),
    so the stream resumes anywhere and is the same for every number of ranks and micro-batches.

    Args:
        buckets: of the pictures.
        global_batch, rank, world, accumulate, seed, start: see :class:`datamodules.sampler.SerialBatchSampler`.

    Raises:
        UserError: when the batch does not divide.
    """

    def __init__(
        self,
        buckets: Buckets,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        check_batch(global_batch, world, accumulate)
        self.buckets = buckets
        self.counts = np.array([len(buckets.members(number)) for number in range(len(buckets.sides))])
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.seed = seed
        self.start = start
        self._plan: tuple[int, np.ndarray] | None = None

    def bucket_of_step(self, step: int) -> tuple[int, int]:
        """Bucket of an optimizer step, and which batch of that bucket it is."""
        epoch = self._epoch_of(step)
        plan = self._order(epoch)
        place = step - int(self._batches_before(epoch).sum())
        number = int(plan[place])
        return number, int(self._batches_before(epoch)[number]) + int((plan[:place] == number).sum())

    def keys_of_step(self, step: int) -> np.ndarray:
        """The whole global batch of an optimizer step, int64 [global batch, 2]."""
        number, batch = self.bucket_of_step(step)
        members, size = self.buckets.members(number), self.global_batch
        place, end = batch * size, (batch + 1) * size
        indices = []
        while place < end:
            epoch, inside = divmod(place, len(members))
            order = members[epoch_order(len(members), self.seed + number, epoch)]
            indices.append(order[inside : inside + end - place])
            place += len(indices[-1])
        return np.stack([np.arange(step * size, (step + 1) * size), np.concatenate(indices)], axis=1)

    def __iter__(self) -> Iterator[np.ndarray]:
        return micro_batches(self.keys_of_step, self.start, self.global_batch, self.rank, self.world, self.accumulate)

    def _batches_before(self, epoch: int) -> np.ndarray:
        return epoch * self.counts // self.global_batch

    def _epoch_of(self, step: int) -> int:
        # Batches before an epoch never fall: the last epoch that begins at or before the step holds it.
        low = step * self.global_batch // int(self.counts.sum())
        high = (step + 1 + len(self.counts)) * self.global_batch // int(self.counts.sum()) + 2
        epochs = range(low, high + 1)
        return epochs[bisect_right(epochs, step, key=lambda epoch: int(self._batches_before(epoch).sum())) - 1]

    def _order(self, epoch: int) -> np.ndarray:
        if self._plan is None or self._plan[0] != epoch:
            batches = self._batches_before(epoch + 1) - self._batches_before(epoch)
            plan = np.repeat(np.arange(len(batches)), batches)
            self._plan = (epoch, plan[epoch_order(len(plan), self.seed ^ _PLAN, epoch)])
        return self._plan[1]
