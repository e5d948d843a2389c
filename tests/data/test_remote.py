"""Our stores behind a URL: the same batches, files fetched once and checked."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from datamodules import remote
from datamodules.latents import LatentDataModule
from datamodules.store import DamagedStore
from repalign.errors import UserError
from tasks.check import check_root
from tasks.launch import compose
from tasks.precompute import Networks, precompute
from tests.data.conftest import TinyAutoencoder, TinyEncoder
from tests.data.stores import SMALL, N, batches, hurt, latents, shapes
from tests.data.stores import same as same_batch


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between tries."""
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder cache/<pictures> with latents and features."""
    networks = Networks(TinyAutoencoder(), {"main": TinyEncoder()})
    return precompute(shapes(tmp_path), networks, SMALL)["latents"].folder.parent


@pytest.fixture
def url(store: Path) -> Iterator[str]:
    """The same in the memory of this process."""
    fsspec.filesystem("memory").put(str(store), "/bucket/pictures", recursive=True)
    yield "memory://bucket/pictures"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are fetched."""
    paths: list[str] = []
    original = MemoryFileSystem.get_file
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda self, *a: paths.append(a[0]) or original(self, *a))
    return paths


def far(url: str, tmp_path: Path, **options: object) -> LatentDataModule:
    data = latents(tmp_path, root=url, remote_cache=tmp_path / "remote", **options)
    data.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    return data


def same(one: list[dict[str, torch.Tensor]], two: list[dict[str, torch.Tensor]]) -> bool:
    return all(same_batch(a, b) for a, b in zip(one, two, strict=True))


def test_the_same_batches_and_every_file_once(url: str, tmp_path: Path, fetched: list[str]) -> None:
    near = latents(tmp_path)
    near.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    expected = batches(near, 6)
    assert same(batches(far(url, tmp_path), 6), expected)
    assert len(fetched) == len(set(fetched)) > 7
    assert not list((tmp_path / "remote").rglob("*.incomplete"))
    fetched.clear()
    resumed = far(url, tmp_path, num_workers=2)
    resumed.set_start(2)
    assert same(batches(resumed, 4), expected[2:])
    assert not fetched


def test_only_what_a_batch_reads_is_fetched(url: str, tmp_path: Path, fetched: list[str]) -> None:
    data = far(url, tmp_path)
    fetched.clear()
    data.stores["latents"].gather("moments", [4, 3, 19])
    assert sorted(path.rpartition("/")[2] for path in fetched) == ["moments.00001.npy", "moments.00006.npy"]
    assert len(data.stores["latents"]) == N and "moments" in data.stores["latents"].arrays
    assert data.stores["latents"].info["pictures"] == N


def test_workers_fetch_for_themselves(store: Path, tmp_path: Path) -> None:
    near = latents(tmp_path)
    near.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    assert same(batches(far(f"file://{store}", tmp_path, num_workers=2), 6), batches(near, 6))


def _gather(url: str, cache_root: Path) -> list[str]:
    """In another process: what it had to fetch."""
    from fsspec.implementations.local import LocalFileSystem

    names: list[str] = []
    original = LocalFileSystem.get_file
    LocalFileSystem.get_file = lambda self, *a, **k: names.append(a[0]) or original(self, *a, **k)
    data = LatentDataModule(root=url, image_size=16, batch_size=5, remote_cache=cache_root)
    data.attach_cache(TinyAutoencoder())
    data.stores["latents"].gather("moments", range(N))
    return names


def test_one_process_fetches_a_file(store: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        shares = pool.starmap(_gather, [(f"file://{store}", tmp_path / "remote")] * 3)
    names = sum(shares, [])
    assert len(names) == len(set(names)) > 7


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_damage_is_found_when_fetched(store: Path, tmp_path: Path, damage: str) -> None:
    hurt(next(store.glob("latents-*")), damage)
    data = far(f"file://{store}", tmp_path)
    with pytest.raises(DamagedStore, match=r"moments.00002.npy'.*rows 6 to 8.*data.on_corrupt=skip"):
        batches(data, 4)
    assert not list((tmp_path / "remote").rglob("moments.00002.npy"))
    assert not list((tmp_path / "remote").rglob("*.incomplete"))


def test_damage_is_skipped_on_every_rank_alike(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hurt(next(store.glob("latents-*")), "flip")
    near = latents(tmp_path, on_corrupt="skip")
    near.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    distant = far(f"file://{store}", tmp_path, on_corrupt="skip")
    assert capsys.readouterr().out.count("skipped, 3 of 20 pictures lost") == 2
    assert same(batches(distant, 4), batches(near, 4))


def test_a_replaced_store_is_fetched_anew(url: str, tmp_path: Path) -> None:
    first = far(url, tmp_path).stores["latents"].gather("moments", range(N))

    class Other(TinyAutoencoder):
        def encode(self, images: torch.Tensor):
            return super().encode(1 - images)

    shutil.rmtree(tmp_path / "cache")
    again = precompute(shapes(tmp_path), Networks(Other(), {"main": TinyEncoder()}), SMALL)["latents"].folder.parent
    fsspec.filesystem("memory").put(f"{again}/", "/bucket/pictures", recursive=True)
    second = far(url, tmp_path).stores["latents"].gather("moments", range(N))
    assert (first != second).any()


def test_a_network_may_fail_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = ["once"]
    original = MemoryFileSystem.get_file

    def get_file(self, *args):
        if failures:
            raise ConnectionError(failures.pop())
        return original(self, *args)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    data = far(url, tmp_path)
    assert not failures
    failures += ["down"] * remote.TRIES
    with pytest.raises(UserError, match=r"cannot read 'memory://.*npy' \(ConnectionError: down\).*credentials"):
        data.stores["latents"].gather("moments", [0])


def test_wrong_addresses(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    for root, words in (
        ("memory://nothing/here", "data.root: no stored latents at 'memory://nothing/here'"),
        (f"file://{tmp_path}/absent", "data.root: no stored latents at"),
        ("s4://bucket/pictures", "data.root: 's4://bucket/pictures' is no place .*not known"),
        ("s3://bucket/pictures", r"needs a package .*s3fs.*pip install 'repalign\[remote\]'"),
        ("gs://bucket/pictures", r"needs a package .*gcsfs.*pip install 'repalign\[remote\]'"),
    ):
        with pytest.raises(UserError, match=words):
            latents(tmp_path, root=root, remote_cache=tmp_path / "remote").setup()


def test_the_configuration_accepts_addresses_and_files(tmp_path: Path) -> None:
    check_root(compose(["data=latents", "data.root=s3://bucket/pictures"]))
    file = tmp_path / "latents.h5"
    with pytest.raises(UserError, match="data.root: no folder"):
        check_root(compose(["data=latents_repa_e", f"data.root={file}"]))
    file.touch()
    check_root(compose(["data=latents_repa_e", f"data.root={file}"]))
