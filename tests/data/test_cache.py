"""Cached latents and features equal the live ones, are made once, and are mended when damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import cache
from datamodules.cache import ensure_cached
from datamodules.image_folder import ImageFolder, ImageFolderDataModule
from datamodules.latents import LatentDataModule
from datamodules.repa_layout import import_repa_latents
from datamodules.store import ArrayStore, DamagedStore, Manifest
from datamodules.synthetic import Shapes, SyntheticDataModule
from repalign.errors import UserError
from repalign.state import Gaussian, Tokens
from tasks.precompute import precompute
from tests.data.conftest import TinyAutoencoder, TinyEncoder

N = 20


def shapes(tmp_path: Path, **options: object) -> SyntheticDataModule:
    common = {"batch_size": 5, "image_size": 16, "size": N, "cache_root": tmp_path / "cache", "seed": 1}
    return SyntheticDataModule(**{**common, **options})


def latents(tmp_path: Path, **options: object) -> LatentDataModule:
    root = next((tmp_path / "cache").iterdir())
    return LatentDataModule(**{"root": root, "image_size": 16, "batch_size": 5, "seed": 1, **options})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows per shard, so that there are many."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 3 * 4 * 48)  # three rows of latents


def batches(data: SyntheticDataModule | LatentDataModule, number: int = 12) -> list[dict[str, torch.Tensor]]:
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(number)]


@pytest.mark.parametrize("flip", [False, True])
def test_cached_equals_live(tmp_path: Path, flip: bool) -> None:
    autoencoder, encoder = TinyAutoencoder(), TinyEncoder()
    live = shapes(tmp_path, horizontal_flip=flip)
    data = shapes(tmp_path, horizontal_flip=flip, feature_dtype="float32")
    data.attach_cache(autoencoder, {"main": encoder}, compute_batch=7)
    for batch, expected in zip(batches(data), batches(live), strict=True):
        images = expected["image"].float() / 255
        moments = autoencoder.encode(images)
        torch.testing.assert_close(batch["moments_mean"], moments.mean)
        torch.testing.assert_close(batch["moments_std"], moments.std)
        torch.testing.assert_close(batch["features/main"], encoder(images).data)
        assert "image" not in batch
        for name in ("label", "serial", "index"):
            assert torch.equal(batch[name], expected[name])


def test_both_views_are_stored(tmp_path: Path) -> None:
    data = shapes(tmp_path, horizontal_flip=True)
    data.attach_cache(TinyAutoencoder())
    store = data.stores["latents"]
    assert len(store) == 2 * N
    images = data.images(range(N)).float() / 255
    plain, mirrored = (TinyAutoencoder().encode(view).mean.numpy() for view in (images, images.flip(-1)))
    assert np.allclose(store.gather("moments_mean", range(N)), plain)
    assert np.allclose(store.gather("moments_mean", range(N, 2 * N)), mirrored)
    assert not np.allclose(plain, mirrored)


def test_features_are_half_precision_on_disk_and_float32_in_batches(tmp_path: Path) -> None:
    data = shapes(tmp_path)
    data.attach_cache(None, {"main": TinyEncoder()})
    assert data.stores["features_main"].manifest.arrays["features/main"].dtype == "float16"
    batch = batches(data, 1)[0]
    assert batch["features/main"].dtype == torch.float32
    live = TinyEncoder()(batch["image"].float() / 255).data
    torch.testing.assert_close(batch["features/main"], live, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "options,networks,pictures,names",
    [
        ({}, (True, True), False, {"latents", "features_main"}),
        ({"keep_images": True}, (True, True), True, {"latents", "features_main"}),
        ({"cache_features": False}, (True, True), True, {"latents"}),
        ({"cache_latents": False}, (True, True), True, {"features_main"}),
        ({}, (True, False), False, {"latents"}),
        ({}, (False, True), True, {"features_main"}),
        ({}, (False, False), True, set()),
    ],
)
def test_batches_carry_pictures_only_when_needed(
    tmp_path: Path, options: dict[str, bool], networks: tuple[bool, bool], pictures: bool, names: set[str]
) -> None:
    data = shapes(tmp_path, **options)
    data.attach_cache(TinyAutoencoder() if networks[0] else None, {"main": TinyEncoder()} if networks[1] else {})
    assert set(data.stores) == names
    assert ("image" in batches(data, 1)[0]) == pictures


def test_computed_once(tmp_path: Path) -> None:
    first, second, other = TinyAutoencoder(), TinyAutoencoder(), TinyAutoencoder()
    other.fingerprint = "tiny autoencoder 2"
    shapes(tmp_path).attach_cache(first)
    shapes(tmp_path).attach_cache(second)
    shapes(tmp_path).attach_cache(other)
    assert first.calls == N + 1 and second.calls == 0 and other.calls == N + 1  # one for the shapes


def test_stopped_work_is_continued(tmp_path: Path) -> None:
    class Stopped(TinyAutoencoder):
        def encode(self, images: torch.Tensor) -> Gaussian:
            if self.calls > 10:
                raise KeyboardInterrupt
            return super().encode(images)

    with pytest.raises(KeyboardInterrupt):
        shapes(tmp_path).attach_cache(Stopped(), compute_batch=3)
    (manifest,) = (tmp_path / "cache").rglob("manifest.json")
    done = len(Manifest.load(manifest.parent).files) // 4
    assert 0 < done < 7
    with pytest.raises(DamagedStore, match="never written"):
        ArrayStore(manifest.parent)
    rest = TinyAutoencoder()
    data = shapes(tmp_path)
    data.attach_cache(rest)
    assert rest.calls == N - 3 * done
    whole = TinyAutoencoder().encode(data.images(range(N)).float() / 255).mean.numpy()
    assert np.allclose(data.stores["latents"].whole("moments_mean"), whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_only_the_damaged_shard_is_made_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = shapes(tmp_path)
    data.attach_cache(TinyAutoencoder())
    good = data.stores["latents"].whole("moments_mean")
    hurt(data.stores["latents"].folder, damage)
    capsys.readouterr()
    again = TinyAutoencoder()
    mended = shapes(tmp_path)
    mended.attach_cache(again)
    said = capsys.readouterr().out
    assert "moments_mean.00002.npy" in said and "this store is ours" in said
    assert again.calls == (6 if damage == "swap" else 3)
    assert np.array_equal(mended.stores["latents"].whole("moments_mean"), good)


def hurt(folder: Path, damage: str) -> None:
    path = folder / "moments_mean.00002.npy"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        os.truncate(path, path.stat().st_size - 10)
    elif damage == "remove":
        path.unlink()
    else:
        other, spare = folder / "moments_mean.00003.npy", folder / "spare"
        path.rename(spare)
        other.rename(path)
        spare.rename(other)


def test_values_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    class Loud(TinyEncoder):
        def __call__(self, images: torch.Tensor) -> Tokens:
            return super().__call__(images).with_data(1e6 * super().__call__(images).data)

    with pytest.raises(UserError, match="features/main.*float16.*data.feature_dtype=float32"):
        shapes(tmp_path).attach_cache(None, {"main": Loud()})
    shapes(tmp_path, feature_dtype="float32").attach_cache(None, {"main": Loud()})


def test_no_fingerprint_and_several_streams(tmp_path: Path) -> None:
    nameless = TinyAutoencoder()
    nameless.fingerprint = ""
    with pytest.raises(UserError, match="data.cache_latents: TinyAutoencoder has no fingerprint"):
        shapes(tmp_path).attach_cache(nameless)


def test_networks_return_to_their_mode(tmp_path: Path) -> None:
    class Net(torch.nn.Module, TinyAutoencoder):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            TinyAutoencoder.__init__(self)
            self.part = torch.nn.Linear(1, 1)

        def encode(self, images: torch.Tensor) -> Gaussian:
            assert not self.training and not torch.is_grad_enabled()
            return TinyAutoencoder.encode(self, images)

    net = Net().train()
    net.part.eval()
    shapes(tmp_path).attach_cache(net)
    assert net.training and not net.part.training


def test_a_skipped_file_brings_its_replacements_latent_and_label(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / ImageFolder(folder, 32).files[3], 20)
    data = ImageFolderDataModule(
        root=folder, image_size=32, batch_size=12, on_corrupt="skip", cache_root=tmp_path, num_classes=3
    )
    data.attach_cache(TinyAutoencoder())
    batch = next(iter(data.train_dataloader()))
    assert 3 not in batch["index"] and (batch["index"] == 4).sum() == 2
    assert torch.equal(batch["label"], torch.from_numpy(data.source.labels)[batch["index"]])
    live = TinyAutoencoder().encode(data.images(batch["index"].tolist()).float() / 255)
    torch.testing.assert_close(batch["moments_mean"], live.mean)


class TestLatentFolder:
    """Training from the stores alone."""

    @pytest.mark.parametrize("flip", [False, True])
    def test_same_batches_as_with_pictures(self, tmp_path: Path, flip: bool) -> None:
        data = shapes(tmp_path, horizontal_flip=flip)
        folders = precompute(data, TinyAutoencoder(), {"main": TinyEncoder()})
        assert set(folders) == {"latents", "features_main"}
        alone = latents(tmp_path, horizontal_flip=flip)
        assert alone.num_classes == 4 and list(alone.class_names) == list(data.class_names)
        alone.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
        for one, two in zip(batches(alone), batches(data), strict=True):
            two.pop("caption")
            assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)

    @pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
    def test_damage_stops(self, tmp_path: Path, damage: str) -> None:
        data = shapes(tmp_path)
        hurt(precompute(data, TinyAutoencoder(), {})["latents"], damage)
        with pytest.raises(DamagedStore) as error:
            latents(tmp_path).attach_cache(TinyAutoencoder())
        for word in ("moments_mean.00002.npy", "expected", "rows 6 to 8", "data.on_corrupt=skip"):
            assert word in str(error.value)

    def test_damage_is_skipped_in_all_stores_alike(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = shapes(tmp_path)
        hurt(precompute(data, TinyAutoencoder(), {"main": TinyEncoder()})["latents"], "truncate")
        streams = []
        for _ in range(2):
            capsys.readouterr()
            alone = latents(tmp_path, on_corrupt="skip")
            alone.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
            assert "skipped, 3 of 20 pictures lost" in capsys.readouterr().out
            streams.append(batches(alone, 4))
        seen = torch.cat([batch["index"] for batch in streams[0]])
        assert not {6, 7, 8} & set(seen.tolist()) and (seen == 9).sum() == 4
        for one, two in zip(*streams, strict=True):
            assert all(torch.equal(one[k], two[k]) for k in one)
            images = Shapes(N, 16).load(one["index"].tolist())[0]
            live = torch.from_numpy(images).float() / 255
            torch.testing.assert_close(one["moments_mean"], TinyAutoencoder().encode(live).mean)
            torch.testing.assert_close(one["features/main"], TinyEncoder()(live).data, atol=1e-3, rtol=1e-3)
            assert torch.equal(one["label"], one["index"] % 4)

    def test_what_it_lacks_is_said(self, tmp_path: Path) -> None:
        precompute(shapes(tmp_path), TinyAutoencoder(), {})
        other = TinyAutoencoder()
        other.fingerprint = "tiny autoencoder 2"
        with pytest.raises(UserError, match="another network: found tiny autoencoder 1, expected tiny autoencoder 2"):
            latents(tmp_path).attach_cache(other)
        with pytest.raises(UserError, match="has no features_main, only latents.*task=precompute"):
            latents(tmp_path).attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
        with pytest.raises(UserError, match="data.horizontal_flip.*no mirrored pictures"):
            latents(tmp_path, horizontal_flip=True).attach_cache(TinyAutoencoder())
        with pytest.raises(UserError, match="pictures are needed"):
            next(latents(tmp_path).reference_images(4))
        with pytest.raises(UserError, match="has no pictures"):
            latents(tmp_path).attach_cache(None)
        with pytest.raises(UserError, match="data.image_size: found 32.*16 px"):
            latents(tmp_path, image_size=32).setup()
        with pytest.raises(UserError, match="data.root: no folder"):
            latents(tmp_path, root=tmp_path / "absent").setup()
        with pytest.raises(UserError, match="data.root: no stored latents"):
            latents(tmp_path, root=tmp_path).setup()
        with pytest.raises(UserError, match="REPALIGN_LATENTS"):
            latents(tmp_path, root=None).setup()


class TestRepaLayout:
    """The official preparation's latents become our cache of the same pictures."""

    @pytest.fixture
    def official(self, images: ImageFolder, tmp_path: Path) -> Path:
        root = tmp_path / "vae-sd"
        pairs = []
        for i in range(len(images)):
            moments = TinyAutoencoder().encode(torch.from_numpy(images.load([i])[0]).float() / 255)
            file = f"{i // 5:05d}/img-mean-std-{i:08d}.npy"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            np.save(root / file, torch.cat([moments.mean[0], moments.std[0]]).numpy())
            pairs.append([file, int(images.labels[i])])
        (root / "dataset.json").write_text(json.dumps({"labels": pairs}))
        return root

    def test_nothing_is_encoded_again(self, official: Path, folder: Path, tmp_path: Path) -> None:
        data = ImageFolderDataModule(root=folder, image_size=32, batch_size=12, cache_root=tmp_path / "cache")
        autoencoder = TinyAutoencoder()
        precompute(data, autoencoder, {}, repa_latents=official)
        assert autoencoder.calls == 1  # the first picture, as a check
        batch = next(iter(data.train_dataloader()))
        live = TinyAutoencoder().encode(data.images(batch["index"].tolist()).float() / 255)
        torch.testing.assert_close(batch["moments_mean"], live.mean)
        torch.testing.assert_close(batch["moments_std"], live.std)

    def test_other_pictures_labels_or_networks(self, official: Path, images: ImageFolder, tmp_path: Path) -> None:
        class Other(TinyAutoencoder):
            def encode(self, images: torch.Tensor) -> Gaussian:
                return Gaussian(super().encode(images).mean + 0.1)

        with pytest.raises(UserError, match="differs by 0.100"):
            import_repa_latents(images, Other(), "x", official, tmp_path)
        labels = json.loads((official / "dataset.json").read_text())
        labels["labels"][4][1] = 2
        (official / "dataset.json").write_text(json.dumps(labels))
        with pytest.raises(UserError, match="gives label 2 to '00000/img-mean-std-00000004.npy', the picture has 1"):
            import_repa_latents(images, TinyAutoencoder(), "x", official, tmp_path)
        (official / "00001" / "img-mean-std-00000005.npy").unlink()
        with pytest.raises(UserError, match="found 11 .npy files"):
            import_repa_latents(images, TinyAutoencoder(), "x", official, tmp_path)


def test_writers_refuse_wrong_shapes(tmp_path: Path) -> None:
    """A network whose output depends on the batch would otherwise be stored under a wrong shape."""
    calls: list[int] = []

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(images))
        return {"x": torch.zeros(len(images), len(calls))}

    with pytest.raises((AssertionError, ValueError)):
        ensure_cached(Shapes(N, 16), "x", "x", compute, root=tmp_path, batch_size=2)
