"""The order of training: an endless stream in which every sample has a serial number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from repalign.errors import UserError

_ORDER = 0x6F72646572  # second Philox key word: keeps the order apart from every other use of the seed


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of ``range(size)`` for one epoch: a pure function of its arguments (Philox, like all draws)."""
    key = np.array([seed % 2**64, _ORDER], dtype=np.uint64)
    counter = np.array([0, epoch, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).permutation(size)


def check_batch(global_batch: int, world: int, accumulate: int) -> None:
    """A global batch can be dealt out to ranks and micro-batches.

    Raises:
        UserError: when it cannot.
    """
    if global_batch < 1 or global_batch % (world * accumulate):
        raise UserError(
            f"data.batch_size: {global_batch} cannot be dealt out to {world} processes (trainer.devices x "
            f"trainer.num_nodes) with {accumulate} micro-batches each (data.accumulate); expected a multiple of "
            f"{world * accumulate}"
        )


def micro_batches(
    keys_of_step: Callable[[int], np.ndarray], start: int, global_batch: int, rank: int, world: int, accumulate: int
) -> Iterator[np.ndarray]:
    """One rank's micro-batches from the optimizer step ``start`` on, without end.

    Positions in the global batch are dealt out in blocks: first by micro-batch, then by rank.
    """
    local = global_batch // (world * accumulate)
    for step in count(start):
        keys = keys_of_step(step)
        for micro in range(accumulate):
            first = (micro * world + rank) * local
            yield keys[first : first + local]


class SerialBatchSampler(Sampler[np.ndarray]):
    """Micro-batches of (serial number, index), int64 [B, 2], for one rank, without end.

    serial = step * global_batch + position in the global batch. Sample ``serial`` is place serial mod N of the
    permutation of epoch serial // N, N = ``size``: the permutations follow each other without a gap, so every picture
    occurs exactly once in each run of N serial numbers that begins at a multiple of N, whatever the batch; a batch may
    hold the end of one epoch and the beginning of the next. Positions are dealt out in blocks: first by micro-batch,
    then by rank, so the samples of an optimizer step are the same for every number of ranks and micro-batches.

    There is no ``__len__`` and no last batch: a trainer that counts epochs would otherwise end a resumed run early when
    its checkpoint fell on an epoch's last batch.

    Args:
        size: number of pictures.
        global_batch: samples of one optimizer step over all ranks and micro-batches; may exceed ``size``.
        rank: of this process.
        world: number of processes.
        accumulate: micro-batches per optimizer step.
        seed: of the order.
        start: first optimizer step.

    Raises:
        UserError: when the batch does not divide.
    """

    def __init__(
        self,
        size: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        check_batch(global_batch, world, accumulate)
        self.size = size
        self.global_batch = global_batch
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.seed = seed
        self.start = start
        self._epoch: tuple[int, np.ndarray] | None = None

    def keys_of_step(self, step: int) -> np.ndarray:
        """The whole global batch of an optimizer step, int64 [global batch, 2]."""
        serial, end = step * self.global_batch, (step + 1) * self.global_batch
        indices = []
        while serial < end:
            epoch, place = divmod(serial, self.size)
            indices.append(self._order(epoch)[place : place + end - serial])
            serial += len(indices[-1])
        return np.stack([np.arange(step * self.global_batch, end), np.concatenate(indices)], axis=1)

    def __iter__(self) -> Iterator[np.ndarray]:
        return micro_batches(self.keys_of_step, self.start, self.global_batch, self.rank, self.world, self.accumulate)

    def _order(self, epoch: int) -> np.ndarray:
        # One epoch's order is kept: drawing a million numbers at every step would cost more than the step's reading.
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(self.size, self.seed, epoch))
        return self._epoch[1]
