"""Tar shards in the convention of webdataset."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path

import pytest
import torch

from datamodules import tar_index
from datamodules.synthetic import Shapes
from datamodules.webdataset import TarPictures, WebDatasetDataModule
from repalign.errors import UserError
from tests.data.conftest import TinyAutoencoder
from tests.data.shards import encoded, write_tar
from tests.data.stores import batches

N = 11


def members(number: int) -> dict[str, bytes]:
    """As CC12M's shards have them: picture, caption, and an object that says it again."""
    text = {"txt": f"picture {number}\n".encode(), "json": json.dumps({"caption": "other", "width": 40}).encode()}
    return {"png": encoded(number), **text}


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    root = tmp_path / "cc12m"
    for shard in range(3):
        numbers = range(4 * shard, min(4 * shard + 4, N))
        write_tar(root / f"cc12m-train-{shard:04d}.tar", [(f"{number:09d}", members(number)) for number in numbers])
    return root


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """As ImageNet's shards have them; names with folders and several dots."""
    root = tmp_path / "imagenet"
    samples = [
        (f"a/b{i}", {"cls": b"%d" % (i % 3), "json": b"[]", "seg.png": b"", "PNG": encoded(i)}) for i in range(N)
    ]
    write_tar(root / "train-0.tar", samples[:6])
    write_tar(root / "train-1.tar", samples[6:])
    return root


def test_captions_without_classes(captioned: Path, tmp_path: Path) -> None:
    source = TarPictures(captioned, 32, cache_root=tmp_path)
    assert len(source) == N and list(source.class_names) == ["all"] and source.labels.tolist() == [0] * N
    assert list(source.captions) == [f"picture {number}" for number in range(N)]
    assert source.captions[-2:] == ["picture 9", "picture 10"]
    order = [10, 0, 4, 3, 3]
    loaded, index = source.load(order)
    assert index.tolist() == order and (loaded == Shapes(24, 32).load(order)[0]).all()
    assert source.original_sizes(order).tolist() == [[32, 40]] * 5 and source.original_sizes([]).shape == (0, 2)


def test_labels_without_captions(labelled: Path, tmp_path: Path) -> None:
    source = TarPictures(labelled, 32, cache_root=tmp_path, num_classes=3)
    assert source.labels.tolist() == [i % 3 for i in range(N)] and source.captions is None
    assert (source.load(range(N))[0] == Shapes(24, 32).load(range(N))[0]).all()


def test_labels_and_captions_from_objects(tmp_path: Path) -> None:
    texts = [{"caption": " a text ", "label": i} for i in range(3)]
    write_tar(
        tmp_path / "a.tar", [(f"{i}", {"png": encoded(i), "json": json.dumps(texts[i]).encode()}) for i in range(3)]
    )
    source = TarPictures(tmp_path, 32, cache_root=tmp_path)
    assert list(source.captions) == ["a text"] * 3 and source.labels.tolist() == [0, 1, 2]


def test_the_index_is_made_once(captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TarPictures(captioned, 32, cache_root=tmp_path)
    opened: list[Path] = []
    original = tarfile.open
    monkeypatch.setattr(tar_index.tarfile, "open", lambda path, mode: opened.append(path) or original(path, mode))
    again = TarPictures(captioned, 32, cache_root=tmp_path)
    assert not opened and again.fingerprint == first.fingerprint
    write_tar(captioned / "cc12m-train-0003.tar", [("000000011", members(11))])
    opened.clear()
    assert len(TarPictures(captioned, 32, cache_root=tmp_path)) == N + 1
    assert [path.name for path in opened] == ["cc12m-train-0003.tar"]


def test_batches_with_workers_and_resume(captioned: Path, tmp_path: Path) -> None:
    def data(workers: int) -> WebDatasetDataModule:
        module = WebDatasetDataModule(
            root=captioned, image_size=32, batch_size=4, seed=3, num_workers=workers, cache_root=tmp_path / "cache"
        )
        module.attach_cache(TinyAutoencoder())
        module.dataset.with_images = True
        return module

    alone = batches(data(0), 6)
    for one, two in zip(alone, batches(data(2), 6), strict=True):
        assert one.pop("caption") == two.pop("caption") == [f"picture {i}" for i in two["index"]]
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        live = TinyAutoencoder().encode(one["image"].float() / 255)
        torch.testing.assert_close(one["moments_mean"], live.mean)
    later = data(0)
    later.set_start(3)
    assert [b["index"].tolist() for b in batches(later, 3)] == [b["index"].tolist() for b in alone[3:]]


def test_stores_keep_captions_and_sizes(captioned: Path, tmp_path: Path) -> None:
    data = WebDatasetDataModule(root=captioned, image_size=32, batch_size=4, cache_root=tmp_path / "cache")
    data.attach_cache(TinyAutoencoder())
    store = data.stores["latents"]
    assert store.gather("caption", [3, 10]).tolist() == ["picture 3", "picture 10"]
    assert store.gather("original_size", [3, 10]).tolist() == [[32, 40]] * 2


def test_torn_pictures(captioned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = captioned / "cc12m-train-0001.tar"
    write_tar(shard, [(f"{i:09d}", {**members(i), "png": encoded(i)[: 80 if i == 5 else None]}) for i in range(4, 8)])
    with pytest.raises(UserError, match=r"0001.tar' \(80 bytes at offset .*data.on_corrupt=skip"):
        TarPictures(captioned, 32, cache_root=tmp_path).load([5])
    with caplog.at_level(logging.WARNING):
        assert TarPictures(captioned, 32, "skip", cache_root=tmp_path).load([4, 5])[1].tolist() == [4, 6]
    assert caplog.records[0].getMessage().startswith("skipped (1 so far of 11)")


def test_samples_without_a_picture(captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(
        captioned / "cc12m-train-0003.tar", [("x", {"txt": b"failed"}), (".hidden", {"txt": b""}), ("y", members(1))]
    )
    assert len(TarPictures(captioned, 32, cache_root=tmp_path)) == N + 1
    assert "1 samples" in capsys.readouterr().out
    for shard in captioned.glob("*"):
        write_tar(shard, [("x", {"txt": b"failed"})])
    with pytest.raises(UserError, match="4 shards .* have no picture"):
        TarPictures(captioned, 32, cache_root=tmp_path)


@pytest.mark.parametrize("cut", ["picture", "header", "end mark"])
def test_torn_shards(captioned: Path, tmp_path: Path, cut: str) -> None:
    shard = captioned / "cc12m-train-0002.tar"
    with tarfile.open(shard) as archive:
        last = archive.getmembers()[-1]
    whole = last.offset_data + 512 * -(-last.size // 512)
    keep = {"picture": 700, "header": last.offset + 100, "end mark": whole}[cut]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"data.root: .*0002.tar'.*copy it again"):
        TarPictures(captioned, 32, cache_root=tmp_path)


def test_mistakes(captioned: Path, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found 1 classes.*data.num_classes=1000"):
        TarPictures(captioned, 32, cache_root=tmp_path, num_classes=1000)
    with pytest.raises(UserError, match="data.files: nothing"):
        TarPictures(captioned, 32, cache_root=tmp_path, files="*.tgz")
    write_tar(labelled / "train-2.tar", [("x", members(0))])
    with pytest.raises(UserError, match=r"11 of 12 samples .* have a label.*train-2.tar.*data.files"):
        TarPictures(labelled, 32, cache_root=tmp_path)
    write_tar(labelled / "train-2.tar", [("x", {"png": encoded(0), "cls": b"dog"})])
    with pytest.raises(UserError, match="'x.cls' in .*train-2.tar' holds b'dog', expected a label"):
        TarPictures(labelled, 32, cache_root=tmp_path)
    write_tar(labelled / "train-2.tar", [("x", {"png": encoded(0), "json": b"{"})])
    with pytest.raises(UserError, match="'x.json' in .*train-2.tar' is no JSON"):
        TarPictures(labelled, 32, cache_root=tmp_path)
    (labelled / "train-2.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(UserError, match="train-2.tar' is no whole uncompressed tar"):
        TarPictures(labelled, 32, cache_root=tmp_path)
