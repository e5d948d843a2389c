"""Parquet files as the Hugging Face hub has them."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.parquet import ParquetDataModule, ParquetPictures
from datamodules.synthetic import SHAPES, Shapes
from repalign.errors import UserError
from tests.data.conftest import TinyAutoencoder
from tests.data.shards import encoded, write_parquet
from tests.data.stores import batches

N = 16


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two files of a training part and one of another; 3 rows per row group."""
    captions = [f"picture {number}" for number in range(N)]
    for part, numbers in enumerate((range(10), range(10, N))):
        texts = pa.array([captions[number] for number in numbers])
        write_parquet(
            tmp_path / "data" / f"train-{part:05d}-of-00002.parquet", numbers, names=list(SHAPES), caption=texts
        )
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(3), names=list(SHAPES), caption=texts[:3])
    return tmp_path


def test_pictures_labels_names_and_captions(root: Path) -> None:
    source = ParquetPictures(root, 32, files="data/train-*.parquet", caption="caption")
    assert len(source) == N and source.class_names == list(SHAPES)
    assert source.labels.tolist() == [number % 4 for number in range(N)]
    assert list(source.captions) == [f"picture {number}" for number in range(N)]
    assert source.captions[2:4] == ["picture 2", "picture 3"]
    order = [15, 0, 9, 10, 3, 3]
    loaded, index = source.load(order)
    assert index.tolist() == order and (loaded == Shapes(24, 32).load(order)[0]).all()
    assert source.original_sizes(order).tolist() == [[32, 40]] * 6
    assert len(ParquetPictures(root, 32)) == N + 3


def test_plain_bytes_without_names_or_labels(tmp_path: Path) -> None:
    table = pa.table({"jpg": [encoded(i) for i in range(5)], "kind": pa.array([0, 2, 2, 0, 1], pa.int32())})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetPictures(tmp_path, 32, image="jpg", label="kind")
    assert list(source.class_names) == ["0", "1", "2"] and source.labels.tolist() == [0, 2, 2, 0, 1]
    assert (source.load([4])[0] == Shapes(24, 32).load([4])[0]).all()
    bare = ParquetPictures(tmp_path, 32, image="jpg", label=None)
    assert list(bare.class_names) == ["all"] and bare.labels.tolist() == [0] * 5 and bare.captions is None
    assert bare.fingerprint != source.fingerprint


def test_batches_with_workers_and_resume(root: Path, tmp_path: Path) -> None:
    def data(workers: int) -> ParquetDataModule:
        module = ParquetDataModule(
            root=root,
            files="data/train-*.parquet",
            image_size=32,
            batch_size=5,
            caption="caption",
            seed=3,
            num_workers=workers,
            keep_images=True,
            cache_root=tmp_path / "cache",
        )
        module.attach_cache(TinyAutoencoder())
        return module

    alone = batches(data(0), 7)
    for one, two in zip(alone, batches(data(2), 7), strict=True):
        assert one.pop("caption") == two.pop("caption") == [f"picture {i}" for i in two["index"]]
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        live = TinyAutoencoder().encode(one["image"].float() / 255)
        torch.testing.assert_close(one["moments_mean"], live.mean)
    later = data(0)
    later.set_start(4)
    for one, two in zip(alone[4:], batches(later, 3), strict=True):
        assert torch.equal(one["index"], two["index"]) and torch.equal(one["image"], two["image"])


def test_rows_that_are_no_pictures(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "data" / "train-00000-of-00002.parquet"
    table = pq.read_table(path)
    images = table.column("image").to_pylist()
    images[4], images[5] = {"bytes": None, "path": "x.png"}, {"bytes": images[5]["bytes"][:90], "path": "y.png"}
    column = pa.array(images, table.schema.field("image").type)
    pq.write_table(table.set_column(0, "image", column), path, row_group_size=3)
    with pytest.raises(UserError, match=r"train-00000.*row group 1, row 1.*no bytes.*data.on_corrupt=skip"):
        ParquetPictures(root, 32, files="data/train-*.parquet").load([4])
    source = ParquetPictures(root, 32, on_corrupt="skip", files="data/train-*.parquet")
    with caplog.at_level(logging.WARNING):
        loaded, index = source.load([3, 4, 5])
    assert index.tolist() == [3, 6, 6] and len(caplog.records) == 2
    assert (loaded == Shapes(24, 32).load([3, 6, 6])[0]).all()


def test_mistakes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"image": "imgae"}, "data.image: unknown column of .*Did you mean 'image'"),
        ({"label": "caption"}, "data.label: column 'caption'.*string, expected integers"),
        ({"caption": "label"}, "data.caption: column 'label'.*expected texts"),
        ({"image": "label"}, "data.image: column 'label'.*int64, expected bytes"),
        ({"files": "*.parquet"}, r"data.files: nothing in .* matches '\*.parquet'; it holds data"),
        ({"num_classes": 1000}, "found 4 classes.*data.num_classes=1000"),
        ({"on_corrupt": "skipp"}, "Did you mean 'skip'"),
    ):
        with pytest.raises(UserError, match=words):
            ParquetPictures(root, 32, **options)
    with pytest.raises(UserError, match="data.root: no folder"):
        ParquetPictures(tmp_path / "absent", 32)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    pq.write_table(pa.table({"image": [b"x"], "label": [-1]}), hidden / "test.parquet")
    with pytest.raises(UserError, match="label -1 of picture 0, expected 0 or more"):
        ParquetPictures(hidden, 32)
    torn = root / "data" / "train-00001-of-00002.parquet"
    torn.write_bytes(torn.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot read .*train-00001.* as Parquet"):
        ParquetPictures(root, 32)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"data=parquet: needs a package.*pip install 'repalign\[data\]'"):
        ParquetPictures(root, 32)


def test_row_groups_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, every row group is read once."""
    source = ParquetPictures(root, 32, files="data/train-*.parquet")
    source.load([0])
    reads: list[int] = []
    file = type(next(iter(source._handles.values())))
    original = file.read_row_group
    monkeypatch.setattr(file, "read_row_group", lambda self, i, **k: reads.append(i) or original(self, i, **k))
    np.testing.assert_array_equal(source.load(range(N))[0], Shapes(24, 32).load(range(N))[0])
    assert reads == [1, 2, 3, 0, 1]
