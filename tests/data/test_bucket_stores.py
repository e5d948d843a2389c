"""Stores of pictures in buckets: what training reads from them is what it would compute, sample by sample."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.bucket_stores import BucketStores
from datamodules.cache import Making
from datamodules.captioned import CaptionedFolder
from datamodules.channel_statistics import STATISTICS
from datamodules.image_text import ImageTextDataModule
from datamodules.own_store import Share
from repalign.errors import UserError
from tasks.precompute import Networks, make_share, precompute
from tests.data.conftest import TinyAutoencoder
from tests.data.test_image_text import folder, module

__all__ = ["folder"]

CUT = {"image_size": 64, "buckets": True, "bucket_step": 16, "upscale": True, "cache_latents": True}
WORLD, BATCH = 3, 3


def bucketed(folder: Path, cache: Path, **options) -> ImageTextDataModule:
    return module(folder, CaptionedFolder, cache, **{"batch_size": BATCH, **CUT, **options})


def taken(data: ImageTextDataModule, steps: int, rank: int = 0, world: int = 1, start: int = 0) -> list[dict]:
    sampler = data.make_sampler(data.batch_size, rank, world, 1, data.seed, start)
    return [data.dataset.__getitems__(keys) for keys in islice(sampler, steps)]


@pytest.mark.parametrize("flip", [False, True])
def test_an_epoch_of_three_ranks_from_stores_is_the_epoch_from_pictures(folder, tmp_path, flip):
    """Same pictures, same latents, same order; every picture once in each round of its bucket."""
    autoencoder = TinyAutoencoder()
    stored = bucketed(folder, tmp_path / "a", horizontal_flip=flip)
    precompute(stored, Networks(autoencoder))
    assert autoencoder.calls == (2 if flip else 1) * len(stored.dataset) + len(stored._filled)  # a row each for shapes
    plain = bucketed(folder, tmp_path / "b", horizontal_flip=flip, cache_latents=False)
    steps = 4 * len(stored.dataset) // BATCH
    seen: dict[int, list[int]] = {}
    ranks = [(taken(stored, steps, r, WORLD), taken(plain, steps, r, WORLD)) for r in range(WORLD)]
    for step in range(steps):
        for ours, theirs in (tuple(side[step] for side in rank) for rank in ranks):
            assert "image" not in ours and ours["caption"] == theirs["caption"]
            assert ours["index"].tolist() == theirs["index"].tolist()
            posterior = autoencoder.encode(theirs["image"].float() / 255)
            assert torch.equal(ours["moments"], torch.stack([posterior.mean, posterior.std], 1))
            for index in ours["index"].tolist():
                seen.setdefault(int(stored.source.buckets.of[index]), []).append(index)
    assert sum(map(len, seen.values())) == steps * BATCH
    for number, stream in seen.items():
        members = stored.source.buckets.members(number).tolist()
        for first in range(0, len(stream) - len(members) + 1, len(members)):
            assert sorted(stream[first : first + len(members)]) == members
    later = taken(stored, 3, 1, WORLD, start=4)  # resumed
    assert [b["index"].tolist() for b in later] == [b["index"].tolist() for b in taken(stored, 7, 1, WORLD)[4:]]


def test_stores_are_found_again_and_shared_out(folder, tmp_path):
    whole, parted = bucketed(folder, tmp_path / "a"), bucketed(folder, tmp_path / "b")
    first = precompute(whole, Networks(TinyAutoencoder()))["latents"]
    again = TinyAutoencoder()
    precompute(bucketed(folder, tmp_path / "a"), Networks(again))
    assert again.calls == 0
    made = []
    for part in range(2):
        autoencoder = TinyAutoencoder()
        parted.setup("fit")
        complete = make_share(parted, Networks(autoencoder), Making(), Share(part, 2))
        made.append(autoencoder.calls)
    assert complete and all(made)  # each bucket is one shard, and still both processes work
    second = precompute(parted, Networks(again))["latents"]
    assert again.calls == 0 and isinstance(second, BucketStores) and second.info == first.info
    statistics = (first.folder / STATISTICS).read_bytes()
    assert statistics == (second.folder / STATISTICS).read_bytes()
    for number in whole._filled:
        rows = whole.source.buckets.members(number)
        assert np.array_equal(first.gather("moments", rows), second.gather("moments", rows))


def test_statistics_are_those_of_all_buckets_together(folder, tmp_path):
    data = bucketed(folder, tmp_path)
    store = precompute(data, Networks(TinyAutoencoder()))["latents"]
    values = [store.gather("moments", [i]).astype(np.float64)[0] for i in range(len(store))]
    mean = np.concatenate([v[0].reshape(3, -1) for v in values], 1).mean(1)
    square = np.concatenate([(v**2).sum(0).reshape(3, -1) for v in values], 1).mean(1)
    np.testing.assert_allclose(store.info["statistics"]["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(store.info["statistics"]["std"], np.sqrt(square - mean**2), rtol=1e-9)
    with pytest.raises(ValueError, match="rows of several buckets"):
        store.gather("moments", range(len(store)))
    assert store.gather("label", range(len(store))).shape == (len(store),)


def test_a_torn_picture_of_a_stored_bucket_is_replaced_from_its_bucket(folder, tmp_path):
    (folder / "sub" / "1.png").write_bytes(b"torn")
    data = bucketed(folder, tmp_path, on_corrupt="skip")
    precompute(data, Networks(TinyAutoencoder()))
    buckets = data.source.buckets
    for batch in taken(data, 12):
        assert 1 not in batch["index"].tolist()
        (number,) = {int(buckets.of[i]) for i in batch["index"].tolist()}
        assert tuple(4 * side for side in batch["moments"].shape[-2:]) == buckets.sides[number]


def test_other_buckets_are_other_stores_and_a_folder_of_ones_own_is_refused(folder, tmp_path):
    precompute(bucketed(folder, tmp_path), Networks(TinyAutoencoder()))
    other = TinyAutoencoder()
    precompute(bucketed(folder, tmp_path, bucket_step=32), Networks(other))
    assert other.calls
    with pytest.raises(UserError, match=r"task.output: stores of buckets are read from the cache alone"):
        precompute(bucketed(folder, tmp_path), Networks(other), Making(folder=tmp_path / "own"))
