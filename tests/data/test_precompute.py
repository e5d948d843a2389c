"""What task=precompute promises: killed or shared out, the store is the same; nothing else gets into it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import cache
from datamodules.cache import Making
from datamodules.dataset import SerialLoader
from datamodules.image_folder import ImageFolderDataModule
from datamodules.own_store import Share
from datamodules.progress import progress
from datamodules.store import ArrayStore, DamagedStore, damages
from repalign.autoencoders.latent_norm import statistics_from_file
from repalign.autoencoders.statistics import measure
from repalign.errors import UserError
from tasks.precompute import Networks, make_share, precompute
from tests.data.conftest import TinyAutoencoder, TinyEncoder
from tests.data.stores import SMALL, N, batches, latents, shapes


class TinyText:
    """Tokens that depend on every letter."""

    fingerprint = "tiny text 1"

    def __call__(self, captions: list[str]) -> SimpleNamespace:
        data = torch.tensor([[float(ord(c)) for c in text[:4].ljust(4)] for text in captions])[:, :, None] / 64
        mask = torch.tensor([[i < len(text) for i in range(4)] for text in captions])
        return SimpleNamespace(data=data.expand(-1, -1, 3), mask=mask, pooled=data.mean(1))


def networks() -> Networks:
    return Networks(TinyAutoencoder(), {"main": TinyEncoder()}, {"main": TinyText()})


def content(folder: Path) -> dict[str, bytes]:
    """All files of a cache but the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def in_child(work: Any, renames: int, before: bool) -> int:
    """Run in a process that kills itself at a renaming, and give its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    rename, left = os.replace, [renames]

    def deadly(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] or not before:
            rename(source, target)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly
    try:
        work()
    finally:
        os._exit(0)


def test_killed_at_any_moment_the_store_is_bit_identical(tmp_path: Path) -> None:
    """Before and after every kind of renaming: arrays, records of shards, manifests, statistics."""
    precompute(shapes(tmp_path / "whole", horizontal_flip=True), networks(), SMALL)
    killed = lambda: precompute(shapes(tmp_path / "killed", horizontal_flip=True), networks(), SMALL)
    kills = 0
    for attempt in range(200):
        status = in_child(killed, 1 + attempt % 7, before=attempt % 2 == 0)
        kills += status == -signal.SIGKILL
        if status == 0:
            break
    killed()
    assert kills > 20
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize("parts", [2, 3, 30])
def test_shares_make_the_same_store(tmp_path: Path, parts: int) -> None:
    precompute(shapes(tmp_path / "whole"), networks(), SMALL)
    complete = [make_share(shapes(tmp_path / "parts"), networks(), SMALL, Share(i, parts)) for i in range(parts)]
    assert complete[-1] and not complete[0]
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_share_mends_what_is_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = precompute(shapes(tmp_path), Networks(TinyAutoencoder()), SMALL)["latents"]
    good = content(tmp_path)
    os.truncate(store.folder / "moments.00003.npy", 100)
    (store.folder / "statistics.safetensors").unlink()
    for part in range(2):
        make_share(shapes(tmp_path), Networks(TinyAutoencoder()), SMALL, Share(part, 2))
    assert "moments.00003.npy' ends at byte 100, expected 1280 bytes" in capsys.readouterr().out
    assert content(tmp_path) == good


@pytest.mark.parametrize(
    "options,field",
    [
        ({"latent_dtype": "float16"}, "dtype: found 'float32', expected 'float16'"),
        ({"horizontal_flip": True}, "views: found 1, expected 2"),
        ({"image_size": 20}, "image_size: found 16, expected 20"),
        ({"fingerprint": "other"}, "fingerprint: found 'tiny autoencoder 1', expected 'other'"),
    ],
)
def test_stores_are_not_mixed(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    making = Making(shard_mib=SMALL.shard_mib, folder=tmp_path / "mine")
    precompute(shapes(tmp_path), Networks(TinyAutoencoder()), making)
    autoencoder = TinyAutoencoder()
    autoencoder.fingerprint = options.pop("fingerprint", autoencoder.fingerprint)
    with pytest.raises(UserError) as error:
        precompute(shapes(tmp_path, **options), Networks(autoencoder), making)
    assert field in str(error.value) and str(tmp_path / "mine" / "latents") in str(error.value)


def test_in_the_cache_types_lie_side_by_side(tmp_path: Path) -> None:
    stores = [
        precompute(shapes(tmp_path, latent_dtype=dtype), Networks(TinyAutoencoder()))["latents"]
        for dtype in ("float16", "float32")
    ]
    assert stores[0].folder != stores[1].folder
    alone = latents(tmp_path)
    alone.attach_cache(TinyAutoencoder())
    assert alone.stores["latents"].info["dtype"] == "float32"  # the finer one


def test_a_store_under_another_name_is_refused(tmp_path: Path) -> None:
    store = precompute(shapes(tmp_path), Networks(TinyAutoencoder()))["latents"]
    store.folder.rename(store.folder.with_name(store.folder.name.replace("float32", "float16")))
    with pytest.raises(UserError, match="dtype: found 'float32', expected 'float16'"):
        shapes(tmp_path, latent_dtype="float16").attach_cache(TinyAutoencoder())


def test_header(tmp_path: Path) -> None:
    info = precompute(shapes(tmp_path), Networks(TinyAutoencoder()), SMALL)["latents"].info
    assert info["fingerprint"] == "tiny autoencoder 1" and info["dtype"] == "float32" and info["pictures"] == N
    assert info["image_size"] == 16 and info["views"] == 1 and "torch" in info["versions"]


def test_statistics_of_all_shards(tmp_path: Path) -> None:
    data = shapes(tmp_path)
    store = precompute(data, Networks(TinyAutoencoder()), SMALL)["latents"]
    autoencoder = TinyAutoencoder()
    autoencoder.decode = lambda raw: torch.zeros(len(raw), 3, 16, 16)  # measure() also looks at reconstructions
    expected = measure(autoencoder, data.reference_images(7))
    for key in ("mean", "std"):
        torch.testing.assert_close(store.info["statistics"][key], expected[f"latent_{key}"], rtol=1e-6, atol=1e-7)
    norm = statistics_from_file(store.folder / "statistics.safetensors")
    torch.testing.assert_close(norm.bias.flatten().tolist(), expected["latent_mean"], rtol=1e-6, atol=1e-7)


def test_half_precision_latents(tmp_path: Path) -> None:
    data = shapes(tmp_path, latent_dtype="float16")
    store = precompute(data, Networks(TinyAutoencoder()), SMALL)["latents"]
    batch = batches(data, 1)[0]
    assert batch["moments_mean"].dtype == batch["moments_std"].dtype == torch.float16
    live = TinyAutoencoder().encode(data.images(batch["index"].tolist()).float() / 255)
    torch.testing.assert_close(batch["moments_mean"].float(), live.mean, rtol=2**-11, atol=1e-6)
    assert store.manifest.arrays["moments"].bytes_per_row == 2 * 2 * 48


def test_text_features_follow_the_picture(tmp_path: Path) -> None:
    data = shapes(tmp_path, horizontal_flip=True, feature_dtype="float32")
    stores = precompute(data, networks(), SMALL)
    assert len(stores["text_main"]) == N and len(stores["latents"]) == 2 * N
    alone = latents(tmp_path, horizontal_flip=True)
    alone.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()}, text_encoders={"main": TinyText()})
    for batch in (batches(data, 3)[2], batches(alone, 3)[2]):
        live = TinyText()(batch["caption"])
        assert batch["caption"] == [data.captions[i] for i in batch["index"]]
        assert torch.equal(batch["text/main"], live.data) and torch.equal(batch["text_mask/main"], live.mask)
        assert torch.equal(batch["text_pooled/main"], live.pooled) and batch["text_mask/main"].dtype == torch.bool


def test_captions_of_any_length_come_back(tmp_path: Path) -> None:
    data = shapes(tmp_path)
    data.source.captions = [f"\u00e9{i}" * i for i in range(N)]
    store = precompute(data, Networks(TinyAutoencoder()), SMALL)["latents"]
    order = [7, 0, 19, 7]
    assert store.gather("caption", order).tolist() == [data.source.captions[i] for i in order]
    with pytest.raises(UserError, match="has no captions for text_main"):
        data.source.captions = None
        data.attach_cache(None, text_encoders={"main": TinyText()})


@pytest.mark.parametrize("workers", [0, 2])
def test_original_sizes_and_reading_processes(folder: Path, tmp_path: Path, workers: int) -> None:
    options = {"root": folder, "image_size": 32, "batch_size": 4, "cache_root": tmp_path, "num_workers": workers}
    making = Making(batch=2, workers=workers)
    store = precompute(ImageFolderDataModule(**options), Networks(TinyAutoencoder()), making)["latents"]
    assert store.whole("original_size").tolist() == [[32, 40]] * 12
    assert store.info["crop"] == "adm" and store.whole("index").tolist() == list(range(12))
    os.truncate(folder / "n01443537" / "n01443537_0.png", 20)
    with pytest.raises(UserError) as error:
        precompute(ImageFolderDataModule(**options), Networks(TinyAutoencoder()), making)
    assert str(error.value).startswith("data.root: cannot read") and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "longer"])
def test_damage_is_placed_by_byte(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.files.BLOCK", 256)
    store = precompute(shapes(tmp_path), Networks(TinyAutoencoder()), SMALL)["latents"]
    path = store.folder / "moments.00002.npy"
    whole = path.read_bytes()
    changed = {"flip": whole[:600] + b"?" + whole[601:], "truncate": whole[:601], "longer": whole + b"?"}
    path.write_bytes(changed[damage])
    line = damages(store.folder, store.manifest, "hash")["moments.00002.npy"]
    words = {"flip": "between bytes 512 and 767", "truncate": "ends at byte 601", "longer": "goes on after byte 1280"}
    assert str(path) in line and words[damage] in line
    if damage == "truncate":
        with pytest.raises(DamagedStore, match="moments.00002.npy' cannot be read"):
            ArrayStore(store.folder).gather("moments", [7])


def test_a_stalled_reader_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamodules.base.STALLED_AFTER", 1)
    assert cache.STALLED_AFTER <= 120
    data = ImageFolderDataModule(root=folder, image_size=32, batch_size=4, num_workers=1)
    monkeypatch.setattr(data.source, "load", lambda indices: signal.pause())
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iter(data.train_dataloader()))


class Stalls:
    """Pictures in a memory map whose disk does not answer."""

    mapped = True

    def __len__(self) -> int:
        return 4

    def __getitems__(self, keys: Any) -> dict[str, Any]:
        ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock, as a page fault does
        return {}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stalled_memory_map_ends_the_run(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process itself and in its reading thread; nothing in Python could run meanwhile."""
    monkeypatch.setattr(cache, "STALLED_AFTER", 0.5)
    with open(tmp_path / "said", "w") as said:
        child = os.fork()
        if not child:
            monkeypatch.setattr(sys, "__stderr__", said)
            next(iter(SerialLoader(Stalls(), batch_sampler=[[0, 1]] * 4, num_workers=workers)))
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    text = (tmp_path / "said").read_text()
    assert text.startswith("Timeout (0:00:00.5") and "in _read" in text and "in __getitems__" in text


def test_plain_lines_say_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr("datamodules.progress.time.perf_counter", lambda: now[0])
    with progress("caching", 1000, 400) as advance:
        now[0] += 30
        advance(60)
        now[0] += 270
        advance(540)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "caching: 460/1000 (46%), 2/s, 0:04:30 left",
        "caching: 1000/1000 (100%), 2/s, 0:00:00 left",
        "caching: 1000 in 300.0 s (2/s)",
    ]


def accounting(tmp_path: Path, world: int, workers: int, start: int, number: int) -> np.ndarray:
    """Serial number and picture of everything that all ranks read, in the order of the serial numbers."""
    rows = []
    for rank in range(world):
        data = latents(tmp_path, batch_size=6, num_workers=workers)
        data.attach_cache(TinyAutoencoder())
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        data.set_start(start)
        rows += [torch.stack([batch["serial"], batch["index"]], 1) for batch in batches(data, number)]
    joined = torch.cat(rows).numpy()
    return joined[joined[:, 0].argsort()]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_on_changing_ranks(tmp_path: Path, workers: int) -> None:
    """20 pictures, batch 6: epochs end inside batches. 1, 2, 3 ranks, and 3 -> 2 after a resume, read the same."""
    precompute(shapes(tmp_path), Networks(TinyAutoencoder()), SMALL)
    seen = [accounting(tmp_path, world, workers, 0, 7) for world in (1, 2, 3)]
    seen.append(np.concatenate([accounting(tmp_path, 3, workers, 0, 2), accounting(tmp_path, 2, workers, 2, 5)]))
    assert all(np.array_equal(one, seen[0]) for one in seen)
    assert seen[0][:, 0].tolist() == list(range(42))
    for epoch in range(2):
        assert sorted(seen[0][epoch * N : (epoch + 1) * N, 1]) == list(range(N))
