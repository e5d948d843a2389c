"""Captioned data: where captions are read, which one is chosen, buckets, what is said of mistakes."""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest

from datamodules.buckets import BucketBatchSampler, Buckets, bucket_sides
from datamodules.captioned import CaptionedFolder, CaptionedParquet, CaptionedTars
from datamodules.captions import AllCaptions, CaptionMix
from datamodules.image_text import ImageTextDataModule
from repalign.encoders.text_sd3 import RandomTextEncoder
from repalign.errors import UserError
from tests.data.shards import encoded, write_parquet, write_tar

SIZES = [(40, 32), (64, 32), (32, 64), (40, 32), (32, 32), (96, 48), (32, 40), (48, 96)]  # width, height


def picture(size: tuple[int, int], shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (shade, 100, 200)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """As img2dataset writes them: jpg, txt and json, the json with a synthetic caption or two."""
    root = tmp_path / "cc12m"
    for shard in range(2):
        samples = []
        for number in range(4 * shard, 4 * shard + 4):
            extra = {0: {}, 1: {"long": f"synthetic {number}"}, 2: {"long": [f"first {number}", f"second {number}"]}}
            held = {"caption": f"original {number}", "status": "success", **extra[number % 3]}
            text = f"original {number}\n".encode()
            members = {"png": encoded(number), "txt": text, "json": json.dumps(held).encode()}
            samples.append((f"{number:09d}", members))
        write_tar(root / f"{shard:05d}.tar", samples)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "folder"
    (root / "sub").mkdir(parents=True)
    lines = []
    for number, size in enumerate(SIZES):
        (root / "sub" / f"{number}.png").write_bytes(picture(size, number))
        texts = f"picture {number}" if number % 2 else [f"picture {number}", f"again {number}"]
        lines.append(json.dumps({"file_name": f"sub/{number}.png", "text": texts}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_tars_of_img2dataset(tars, tmp_path):
    source = CaptionedTars(tars, 32, cache_root=tmp_path / "cache", synthetic="long")
    assert len(source) == 8 and source.captions[5] == "original 5"
    assert source.caption_sets(0) == (["original 0"], [])
    assert source.caption_sets(1) == (["original 1"], ["synthetic 1"])
    assert source.caption_sets(5) == (["original 5"], ["first 5", "second 5"])
    assert CaptionedTars(tars, 32, cache_root=tmp_path / "cache").caption_sets(5) == (["original 5"], [])
    assert source.load([3])[0].shape == (1, 3, 32, 32)


def test_parquet_with_lists_of_captions(tmp_path):
    captions = pa.array([[f"one {n}", f"two {n}"] for n in range(5)])
    write_parquet(tmp_path / "p" / "a.parquet", range(5), sentences=captions, long=pa.array(["x", None, "y", "", "z"]))
    source = CaptionedParquet(tmp_path / "p", 32, original="sentences", synthetic="long")
    assert source.caption_sets(3) == (["one 3", "two 3"], [])
    assert source.caption_sets(0) == (["one 0", "two 0"], ["x"])
    assert source.captions[4] == "one 4" and len(source.class_names) == 1
    with pytest.raises(UserError, match=r"pictures.original: unknown column .* 'sentence'. Did you mean 'sentences'"):
        CaptionedParquet(tmp_path / "p", 32, original="sentence")
    with pytest.raises(UserError, match=r"data.pictures.original: expected|data.pictures.original: .*list of texts"):
        CaptionedParquet(tmp_path / "p", 32, original="label").caption_sets(0)


def test_a_folder_with_a_list(folder):
    source = CaptionedFolder(folder, 32)
    assert source.caption_sets(2) == (["picture 2", "again 2"], [])
    assert source.captions[1] == "picture 1"
    assert CaptionedFolder(folder, 32).fingerprint == source.fingerprint


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", r"line 9: expected an object with 'file_name'"),
        ('{"text": "x"}', r"line 9: expected an object with 'file_name'"),
        ('{"file_name": "../x.png", "text": "x"}', r"line 9: file_name '../x.png', expected a file below"),
        ('{"file_name": "no.png", "text": "x"}', r"line 9: no file '.*no.png'"),
        ('{"file_name": "sub/0.png", "txt": "x"}', r"line 9: no caption in 'text'; it has file_name, txt"),
        ('{"file_name": "sub/0.png", "text": 3}', r"line 9: expected a text or a list of texts, found '3'"),
    ],
)
def test_mistakes_in_the_list_are_one_line(folder, line, match):
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=match):
        CaptionedFolder(folder, 32)


class Captions:
    """Three originals and one synthetic caption, or originals alone."""

    caption_options = fingerprint = "captions"
    image_size, attribution = 32, None

    def __len__(self):
        return 6

    def caption_sets(self, index):
        return [f"o{index}.{k}" for k in range(3)], [f"s{index}"] if index % 2 else []


def test_the_mix_has_its_share_and_belongs_to_the_sample():
    mix = CaptionMix(Captions(), original=0.5, seed=0)
    serial, index = np.arange(6000), np.arange(6000) % 6
    texts = mix.texts(serial, index)
    assert all(text[1] == str(i) for text, i in zip(texts, index, strict=True))
    odd = [text for text, i in zip(texts, index, strict=True) if i % 2]
    assert abs(sum(text[0] == "s" for text in odd) / len(odd) - 0.5) < 0.03
    assert all(text[0] == "o" for text, i in zip(texts, index, strict=True) if i % 2 == 0)
    counts = [sum(text.endswith(f".{k}") for text in texts) for k in range(3)]
    assert max(counts) - min(counts) < 0.1 * sum(counts) / 3
    assert mix.texts(serial[40:43], index[40:43]) == texts[40:43]
    flat = AllCaptions(Captions())
    assert [flat.captions[row] for row in mix.rows(serial, index)] == texts
    assert len(flat) == 6 * 3 + 3
    assert all(t[0] == "s" for t in CaptionMix(Captions(), 0.0, 0).texts(serial[:50], np.full(50, 1)))
    with pytest.raises(UserError, match=r"data.original: expected a probability from 0 to 1, found 1.5"):
        CaptionMix(Captions(), 1.5, 0)


def module(root: Path, make, cache: Path, **options) -> ImageTextDataModule:
    options = {"image_size": 32, "batch_size": 4, "cache_root": cache, "cache_latents": False, "seed": 3, **options}
    return ImageTextDataModule(pictures=make, root=root, **options)


def test_batches_carry_a_caption_or_its_stored_states(tars, tmp_path):
    def make(*args, **kwargs):
        return CaptionedTars(*args, synthetic="long", **kwargs)

    plain = module(tars, make, tmp_path / "cache", original=0.5)
    direct = list(islice(plain.train_dataloader(), 6))
    stored = module(tars, make, tmp_path / "cache", original=0.5, cache_features=True, feature_dtype="float32")
    encoder = RandomTextEncoder(6, length=12, pooled=4)
    stored.attach_cache(text_encoders={"main": encoder})
    assert len(stored.stores["text_main"]) == 8 + 3 + 2 * 2  # a row for every caption
    seen = set()
    for ours, batch in zip(islice(stored.train_dataloader(), 6), direct, strict=True):
        assert ours["index"].tolist() == batch["index"].tolist() and "caption" not in ours
        expected = encoder(batch["caption"])
        assert (ours["text/main"] == expected.data).all() and (ours["text_pooled/main"] == expected.pooled).all()
        assert (ours["text_mask/main"] == expected.mask).all()
        seen |= {text.split()[0] for text in batch["caption"]}
    assert {"original", "synthetic"} <= seen


def test_a_torn_picture_is_replaced_with_its_caption(folder, tmp_path):
    (folder / "sub" / "3.png").write_bytes(b"torn")
    batches = list(islice(module(folder, CaptionedFolder, tmp_path / "c", on_corrupt="skip").train_dataloader(), 4))
    texts = [text for batch in batches for text in batch["caption"]]
    assert "picture 3" not in texts and len(texts) == 16
    for batch in batches:
        assert all(text.endswith(str(i)) for text, i in zip(batch["caption"], batch["index"].tolist(), strict=True))
    with pytest.raises(UserError, match=r"cannot read '.*3.png'"):
        list(islice(module(folder, CaptionedFolder, tmp_path / "c").train_dataloader(), 4))


def test_bucket_sides_cover_the_area():
    sides = bucket_sides(1024, 64, 2.0)
    assert sides[0] == (1024, 1024) and (1344, 768) in sides and (768, 1344) in sides
    for height, width in sides:
        assert height % 64 == width % 64 == 0 and max(height, width) <= 2 * min(height, width)
        assert 0.8 * 1024**2 < height * width <= 1024**2
    with pytest.raises(UserError, match=r"data.bucket_step: 48 does not divide data.image_size=256"):
        bucket_sides(256, 48, 2.0)
    with pytest.raises(UserError, match=r"data.bucket_ratio"):
        bucket_sides(256, 64, 0.5)


def made_up(count: int = 103) -> Buckets:
    rng = np.random.default_rng(0)
    return Buckets(rng.integers(200, 600, (count, 2)), bucket_sides(256, 64, 2.0))


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("batch", [6, 48])
def test_an_epoch_over_ranks_loses_no_sample(world, batch):
    """Union of the ranks: one bucket a step, every picture once in each round of its bucket, epochs in proportion."""
    buckets = made_up()
    steps = 4 * 103 // batch + 20
    ranks = [list(islice(BucketBatchSampler(buckets, batch, rank, world), steps)) for rank in range(world)]
    streams: dict[int, list[int]] = {}
    for step in range(steps):
        keys = np.concatenate([rank[step] for rank in ranks])
        assert keys[:, 0].tolist() == list(range(step * batch, (step + 1) * batch))
        (number,) = set(buckets.of[keys[:, 1]].tolist())
        streams.setdefault(number, []).extend(keys[:, 1].tolist())
    for number, stream in streams.items():
        members = buckets.members(number).tolist()
        for first in range(0, len(stream) - len(members) + 1, len(members)):
            assert sorted(stream[first : first + len(members)]) == members
        assert abs(len(stream) - steps * batch * len(members) / 103) <= 2 * batch
    assert set(streams) == set(buckets.of.tolist())


def test_by_the_end_of_an_epoch_less_than_a_batch_of_a_bucket_is_left():
    buckets, batch = made_up(), 6
    sampler = BucketBatchSampler(buckets, batch)
    per_epoch = [int((epoch * sampler.counts // batch).sum()) for epoch in range(4)]
    for epoch in range(1, 4):
        numbers = [sampler.bucket_of_step(step) for step in range(per_epoch[epoch])]
        for number, count in enumerate(sampler.counts.tolist()):
            batches = [place for bucket, place in numbers if bucket == number]
            assert sorted(batches) == list(range(epoch * count // batch))  # each batch of a bucket once


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buckets_resume_anywhere_and_seeds_differ(accumulate):
    def taken(start, seed=0):
        sampler = BucketBatchSampler(made_up(), 6, accumulate=accumulate, seed=seed, start=start)
        return [keys.tolist() for keys in islice(sampler, 8 * accumulate)]

    whole = taken(0)
    for start in (1, 3, 7):
        assert taken(start)[: (8 - start) * accumulate] == whole[start * accumulate :]
    assert taken(0, seed=1) != whole
    assert {len(keys) for keys in whole} == {6 // accumulate}


def test_pictures_in_buckets_have_their_shape(folder, tmp_path):
    options = {"image_size": 64, "buckets": True, "bucket_step": 16, "upscale": True}
    data = module(folder, CaptionedFolder, tmp_path / "c", batch_size=2, **options)
    shapes = {tuple(batch["image"].shape[2:]) for batch in islice(data.train_dataloader(), 12)}
    assert len(shapes) > 2 and all(h % 16 == w % 16 == 0 and h * w <= 64**2 for h, w in shapes)
    assert next(data.reference_images(8)).shape == (8, 3, 64, 64)
    assert (tmp_path / "c" / data.source.fingerprint / "sizes.npy").is_file()


def test_a_torn_picture_of_a_bucket_is_replaced_from_its_bucket(folder, tmp_path):
    (folder / "sub" / "1.png").write_bytes(b"torn")  # counts as a square, then
    options = {"image_size": 64, "buckets": True, "bucket_step": 16, "upscale": True}
    data = module(folder, CaptionedFolder, tmp_path / "c", on_corrupt="skip", **options)
    for batch in islice(data.train_dataloader(), 10):
        assert 1 not in batch["index"].tolist()
        assert len({data.source.buckets.sides_of(i) for i in batch["index"].tolist()}) == 1
