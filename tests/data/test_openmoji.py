"""The embedded pictures and their store."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import openmoji
from datamodules.openmoji import OpenMoji, OpenMojiDataModule
from datamodules.store import Manifest
from repalign.errors import UserError


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose pictures are 40 of all, so that a test may render them anew."""
    chosen = openmoji.catalogue()[::48]
    monkeypatch.setattr(openmoji, "catalogue", lambda: chosen)
    return tmp_path / "cache"


def pictures_in(cache: Path, source: OpenMoji) -> Path:
    return cache / source.fingerprint / "pictures"


def test_counts_classes_and_captions(openmoji_cache: Path) -> None:
    whole = OpenMoji(32, openmoji_cache)
    assert 1800 < len(whole) < 2500
    assert len(whole.class_names) == 9 and "Component" not in whole.class_names
    info = Manifest.load(pictures_in(openmoji_cache, whole)).info
    assert info["counts"] == dict(zip(whole.class_names, np.bincount(whole.labels).tolist(), strict=True))
    assert min(info["counts"].values()) > 50
    assert whole.captions is not None and len(whole.captions) == len(whole)
    assert "pizza" in " ".join(whole.captions) or "slice" in " ".join(whole.captions)
    assert not any("1F3FB" in code for code in info["codes"])
    assert info["codes"] == sorted(info["codes"])


def test_manifest_carries_licence_and_versions(openmoji_cache: Path) -> None:
    info = Manifest.load(pictures_in(openmoji_cache, OpenMoji(32, openmoji_cache))).info
    assert info["licence"] == "CC-BY-SA 4.0" and "OpenMoji" in info["attribution"]
    assert set(info["versions"]) == set(openmoji.PACKAGES)


def test_pictures_are_drawings_on_white(openmoji_cache: Path) -> None:
    whole = OpenMoji(32, openmoji_cache)
    images, index = whole.load(range(0, len(whole), 7))
    assert images.dtype == np.uint8 and images.shape[1:] == (3, 32, 32)
    assert (index == np.arange(0, len(whole), 7)).all()
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).mean() > 0.95
    assert (images.min(axis=(1, 2, 3)) < 200).all(), "no picture is empty"
    flags = images[whole.labels[index] == whole.class_names.index("Flags")]
    assert flags.std(axis=1).max() > 60, "there is colour"


def test_groups_are_labelled_in_the_order_given(openmoji_cache: Path) -> None:
    whole = OpenMoji(32, openmoji_cache)
    some = OpenMoji(32, openmoji_cache, ["Flags", "Activities"])
    assert list(some.class_names) == ["Flags", "Activities"]
    for label, name in enumerate(some.class_names):
        expected = whole.load(np.flatnonzero(whole.labels == whole.class_names.index(name)))[0]
        assert (some.load(np.flatnonzero(some.labels == label))[0] == expected).all()
    assert some.fingerprint != whole.fingerprint
    assert some.fingerprint != OpenMoji(32, openmoji_cache, ["Activities", "Flags"]).fingerprint


@pytest.mark.parametrize(
    "groups,words",
    [
        (["Flagz"], ("data.groups", "'Flagz'", "Did you mean 'Flags'?")),
        (["Flags", "Flags"], ("data.groups", "different names")),
        ([], ("data.groups", "at least one")),
    ],
)
def test_wrong_groups(openmoji_cache: Path, groups: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        OpenMoji(32, openmoji_cache, groups)
    assert all(word in str(error.value) for word in words)


def test_rendered_once(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = OpenMoji(16, few)
    monkeypatch.setattr(openmoji, "render", None)  # a second rendering would call it
    assert (OpenMoji(16, few).load(range(len(first)))[0] == first.load(range(len(first)))[0]).all()


def test_two_renderings_are_the_same_bytes(few: Path, tmp_path: Path) -> None:
    one, two = OpenMoji(16, few), OpenMoji(16, tmp_path / "other")
    hashes = [Manifest.load(pictures_in(c, s)).files for c, s in ((few, one), (tmp_path / "other", two))]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "leftover"])
def test_a_damaged_store_is_named_and_made_again(few: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = OpenMoji(16, few)
    good = source.load(range(len(source)))[0]
    store = pictures_in(few, source)
    path = store / "image.00000.npy"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        os.truncate(path, 5000)
    elif damage == "remove":
        path.unlink()
    elif damage == "manifest":
        os.truncate(store / "manifest.json", 100)
    else:
        (store / ".image.00000.npy.1.incomplete").write_bytes(b"half")
        path.unlink()
    capsys.readouterr()
    again = OpenMoji(16, few)
    said = capsys.readouterr().out
    assert str(store) in said and "this store is ours" in said
    assert ("manifest.json" if damage == "manifest" else "image.00000.npy") in said
    if damage != "manifest":
        assert "expected" in said
    assert (again.load(range(len(again)))[0] == good).all()
    assert not list(store.glob(".*incomplete"))


def test_size_check_alone_misses_a_flipped_bit_but_not_a_short_file(
    few: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pictures_in(few, OpenMoji(16, few)) / "image.00000.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    OpenMoji(16, few, verify="size")
    assert capsys.readouterr().out == ""
    os.truncate(path, 5000)
    OpenMoji(16, few, verify="size")
    assert "expected" in capsys.readouterr().out


def test_two_at_once_render_once(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock belongs to the open file, so two threads stand for two processes."""
    drawn = []
    real = openmoji.render
    monkeypatch.setattr(openmoji, "render", lambda path, size: drawn.append(path) or real(path, size))
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: OpenMoji(16, few), range(2))
    assert len(drawn) == len(one)
    assert (one.load(range(len(one)))[0] == two.load(range(len(two)))[0]).all()


def test_a_finished_store_needs_no_write_access(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OpenMoji(16, few)
    monkeypatch.setattr("datamodules.own_store.locked", None)  # taking the lock would write
    OpenMoji(16, few)


def test_no_room_is_said_before_anything_is_rendered(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="data.cache_root.*GiB free"):
        OpenMoji(16, few)


def test_batches(openmoji_cache: Path) -> None:
    data = OpenMojiDataModule(batch_size=8, image_size=32, cache_root=openmoji_cache)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32) and batch["image"].dtype == torch.uint8
    for name in ("label", "serial", "index"):
        assert batch[name].shape == (8,) and batch[name].dtype == torch.int64
    assert batch["caption"] == [data.captions[i] for i in batch["index"]]
    assert torch.equal(batch["image"], data.images(batch["index"].tolist()))
    assert data.num_classes == len(data.class_names) == 9 and "OpenMoji" in data.attribution
