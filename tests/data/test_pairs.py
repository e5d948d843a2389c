"""Pairs of pictures: how they are read, what a batch of them is, what is said of mistakes."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.pairs import PairDataModule, PairedFolder, PairedShapes, PickAPic, SyntheticPairDataModule
from repalign.encoders.text_sd3 import RandomTextEncoder
from repalign.errors import UserError
from tests.data.shards import encoded

STREAM = {"image_size": 32, "batch_size": 3, "cache_latents": False, "cache_features": False}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pairs"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.png").write_bytes(encoded(number, (32, 32)))
    pairs = [(0, 1, "a"), (2, 1, "a"), (3, 0, "b")]
    lines = [json.dumps({"preferred": f"{w}.png", "rejected": f"{l}.png", "prompt": p}) for w, l, p in pairs]
    (root / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def pick_a_pic(tmp_path):
    root = tmp_path / "pick"
    root.mkdir()
    columns = {
        "jpg_0": [encoded(n, (32, 32)) for n in (0, 1, 2)],
        "jpg_1": [encoded(n, (32, 32)) for n in (3, 4, 5)],
        "caption": ["x", "y", "z"],
        "label_0": pa.array([0.0, 0.5, 1.0]),
    }
    pq.write_table(pa.table(columns), root / "0.parquet")
    return root


def batches(data, number):
    data.setup()
    data.attach_cache()
    return [*islice(data.train_dataloader(), number)]


def test_a_folder_lists_each_picture_once_for_a_prompt(folder):
    source = PairedFolder(folder, 32)
    assert source.files == ["0.png", "1.png", "2.png", "3.png", "0.png"]
    assert source.captions == ["a", "a", "a", "b", "b"]
    assert source.pairs.tolist() == [[0, 1], [2, 1], [3, 4]]


def test_rows_of_pick_a_pic_that_are_no_ties(pick_a_pic):
    source = PickAPic(pick_a_pic, 32)
    assert source.pairs.tolist() == [[1, 0], [4, 5]]
    assert [*source.captions] == ["x", "x", "y", "y", "z", "z"]
    expected = [encoded(n, (32, 32)) for n in (0, 3, 1, 4, 2, 5)]
    assert [source.read(index) for index in range(len(source))] == expected


def test_a_batch_is_the_preferred_then_the_rejected_with_the_same_serial_numbers(folder):
    data = PairDataModule(pictures=PairedFolder, root=folder, **STREAM)
    seen = set()
    for batch in batches(data, 2):
        preferred, rejected = batch["index"].reshape(2, 3)
        assert {*zip(preferred.tolist(), rejected.tolist(), strict=True)} == {(0, 1), (2, 1), (3, 4)}
        assert torch.equal(*batch["serial"].reshape(2, 3))
        assert batch["caption"][:3] == batch["caption"][3:]
        assert torch.equal(batch["image"], data.images(batch["index"].tolist()))
        seen |= set(batch["serial"].tolist())
    assert seen == set(range(6))


def test_micro_batches_and_a_later_start_have_the_same_pairs():
    whole = SyntheticPairDataModule(size=64, **STREAM | {"batch_size": 4})
    split = SyntheticPairDataModule(size=64, **STREAM | {"batch_size": 4}, accumulate=2)
    later = SyntheticPairDataModule(size=64, **STREAM | {"batch_size": 4})
    later.set_start(1)
    first, second = batches(whole, 2)
    parts = batches(split, 2)
    joined = torch.cat([torch.cat([part["index"].reshape(2, 2) for part in parts], 1)])
    assert torch.equal(first["index"].reshape(2, 4), joined)
    assert torch.equal(batches(later, 1)[0]["index"], second["index"])


def test_prompts_and_latents_may_be_stored(folder, tmp_path):
    data = PairDataModule(
        pictures=PairedFolder, root=folder, **STREAM | {"cache_features": True}, cache_root=tmp_path / "cache"
    )
    data.setup()
    encoder = RandomTextEncoder(4, length=3, pooled=2)
    data.attach_cache(text_encoders={"main": encoder})
    batch = next(iter(data.train_dataloader()))
    expected = encoder(batch["caption"]).data
    torch.testing.assert_close(batch["text/main"].float(), expected, atol=1e-3, rtol=1e-3)


def test_the_shape_nearer_to_the_middle_is_preferred():
    source = PairedShapes(67, 32)
    assert source.pairs.shape == (32, 2) and sorted(source.pairs.reshape(-1)) == [*range(64)]
    assert np.array_equal(*source.labels[source.pairs].T)
    boxes = source.boxes(range(64))[:, 0, 1:]
    far = np.hypot(*((boxes[:, :2] + boxes[:, 2:]) / 2 - 0.5).T)
    assert (far[source.pairs[:, 0]] <= far[source.pairs[:, 1]]).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected an object with preferred, rejected, prompt"),
        ('{"preferred": "0.png", "rejected": "1.png"}', "line 1: expected an object .*'prompt'"),
        ('{"preferred": "../0.png", "rejected": "1.png", "prompt": "a"}', "expected a file below the folder"),
        ('{"preferred": "9.png", "rejected": "1.png", "prompt": "a"}', "line 1: no file '.*9.png'"),
        ('{"preferred": "0.png", "rejected": "1.png", "prompt": 3}', "prompt, expected a text, found '3'"),
        ("", "lists no pair"),
    ],
)
def test_mistakes_in_a_list_are_named(folder, line, message):
    (folder / "pairs.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        PairedFolder(folder, 32)


def test_other_mistakes(tmp_path, pick_a_pic):
    with pytest.raises(UserError, match=r"data\.root: no pairs\.jsonl in"):
        PairedFolder(tmp_path, 32)
    with pytest.raises(UserError, match="label: unknown column of .* 'label_1'. Did you mean 'label_0'"):
        PickAPic(pick_a_pic, 32, label="label_1")
    with pytest.raises(UserError, match="holds no numbers"):
        PickAPic(pick_a_pic, 32, label="caption")
    with pytest.raises(UserError, match="expected 8 or more, found 7"):
        PairedShapes(7, 32)
