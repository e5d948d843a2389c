"""The laws of the stream."""

from __future__ import annotations

from itertools import islice

import pytest

from datamodules.sampler import SerialBatchSampler, epoch_order
from repalign.errors import UserError

SIZE, BATCH = 50, 12  # 4 steps and 2 pictures an epoch


def taken(sampler: SerialBatchSampler, number: int) -> list[list[tuple[int, int]]]:
    return [[(serial, index) for serial, index in keys.tolist()] for keys in islice(sampler, number)]


def steps(number: int, **options: int) -> list[list[tuple[int, int]]]:
    """The first optimizer steps of one rank, its micro-batches joined."""
    options = {"size": SIZE, "global_batch": BATCH, **options}
    micro = options.get("accumulate", 1)
    parts = taken(SerialBatchSampler(**options), number * micro)
    return [sum(parts[i * micro : (i + 1) * micro], []) for i in range(number)]


@pytest.mark.parametrize("size,batch", [(48, 12), (50, 12), (12, 12), (13, 1), (5, 12)])
def test_every_index_once_per_epoch(size: int, batch: int) -> None:
    """Whatever the batch: epochs follow each other inside a batch, nothing is left out."""
    stream = [index for step in steps(-(-3 * size // batch), size=size, global_batch=batch) for _, index in step]
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert stream[epoch * size : (epoch + 1) * size] == epoch_order(size, 0, epoch).tolist()


def test_serial_numbers_count_on_across_epochs() -> None:
    serials = [serial for step in steps(9) for serial, _ in step]
    assert serials == list(range(9 * BATCH))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_union_over_ranks_is_the_same(world: int, accumulate: int) -> None:
    sizes = {"size": 80, "global_batch": 36}
    alone = steps(6, **sizes)
    ranks = [steps(6, rank=rank, world=world, accumulate=accumulate, **sizes) for rank in range(world)]
    for step in range(6):
        shares = [rank[step] for rank in ranks]
        assert {len(share) for share in shares} == {36 // world}
        assert sorted(sum(shares, [])) == sorted(alone[step])


def test_accumulation_splits_the_step_in_order() -> None:
    whole, parts = steps(5), taken(SerialBatchSampler(SIZE, BATCH, accumulate=4), 20)
    assert {len(part) for part in parts} == {3}
    assert [sum(parts[4 * i : 4 * i + 4], []) for i in range(5)] == whole


@pytest.mark.parametrize("start", [1, 3, 4, 5, 8, 11])
def test_resumes_from_any_step(start: int) -> None:
    assert steps(4, start=start) == steps(start + 4)[start:]


def test_the_stream_begins_anew_at_every_iteration() -> None:
    sampler = SerialBatchSampler(SIZE, BATCH, start=3)
    assert taken(sampler, 5) == taken(sampler, 5)


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(epoch_order(SIZE, seed, epoch)) for seed in (0, 1, -1) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    assert steps(4) != steps(4, seed=1)


@pytest.mark.parametrize("before,after", [(3, 2), (1, 3), (2, 1)])
def test_no_sample_is_lost_or_doubled_when_the_number_of_ranks_changes(before: int, after: int) -> None:
    """Two epochs, stopped in the middle of the first and continued on another number of ranks."""
    stream: list[tuple[int, int]] = []
    for world, start, number in ((before, 0, 3), (after, 3, 6)):
        ranks = [steps(number, rank=rank, world=world, start=start) for rank in range(world)]
        stream += [key for step in range(number) for rank in ranks for key in rank[step]]
    assert [serial for serial, _ in stream] == list(range(9 * BATCH))
    for epoch in range(2):
        assert sorted(index for _, index in stream[epoch * SIZE : (epoch + 1) * SIZE]) == list(range(SIZE))


def test_the_order_is_frozen() -> None:
    """A changed stream would silently change every published run."""
    assert epoch_order(10, 0, 0).tolist() == [1, 4, 6, 2, 9, 3, 0, 7, 5, 8]
    assert epoch_order(10, 7, 3).tolist() == [2, 1, 8, 9, 7, 3, 0, 6, 4, 5]


def test_it_has_no_length() -> None:
    with pytest.raises(TypeError):
        len(SerialBatchSampler(SIZE, BATCH))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options,words",
    [
        ({"world": 5}, ("data.batch_size: 12", "5 processes", "multiple of 5")),
        ({"world": 2, "accumulate": 4}, ("data.accumulate", "multiple of 8")),
        ({"global_batch": 0}, ("data.batch_size: 0",)),
    ],
)
def test_errors_name_key_and_expectation(options: dict[str, int], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        SerialBatchSampler(**{"size": SIZE, "global_batch": BATCH, **options})
    assert all(word in str(error.value) for word in words)
