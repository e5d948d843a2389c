"""Training from stores alone, and the import of REPA's official latents."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.image_folder import ImageFolder, ImageFolderDataModule
from datamodules.repa_layout import import_repa_latents
from datamodules.sampler import SerialBatchSampler
from datamodules.store import DamagedStore
from datamodules.synthetic import Shapes
from repalign.errors import UserError
from repalign.state import Gaussian
from tasks.precompute import Networks, precompute
from tests.data.conftest import TinyAutoencoder, TinyEncoder
from tests.data.stores import SMALL, N, batches, hurt, latents, same, shapes


@pytest.mark.parametrize("flip", [False, True])
def test_same_batches_as_with_pictures(tmp_path: Path, flip: bool) -> None:
    data = shapes(tmp_path, horizontal_flip=flip)
    stores = precompute(data, Networks(TinyAutoencoder(), {"main": TinyEncoder()}), SMALL)
    assert set(stores) == {"latents", "features_main"}
    alone = latents(tmp_path, horizontal_flip=flip)
    assert alone.num_classes == 4 and list(alone.class_names) == list(data.class_names)
    alone.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    for one, two in zip(batches(alone), batches(data), strict=True):
        del two["boxes"], two["segmentation"]  # stores hold none
        assert same(one, two)


@pytest.mark.parametrize("workers", [1, 2])
def test_read_ahead_changes_nothing(tmp_path: Path, workers: int) -> None:
    precompute(shapes(tmp_path), Networks(TinyAutoencoder(), {"main": TinyEncoder()}), SMALL)
    streams, before = [], threading.active_count()
    for number in (0, workers):
        data = latents(tmp_path, horizontal_flip=False, num_workers=number)
        data.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
        data.set_start(3)
        streams.append(batches(data))
        assert data.dataset.mapped
    assert all(same(one, two) for one, two in zip(*streams, strict=True))
    assert threading.active_count() == before and not multiprocessing.active_children()


def test_an_error_while_reading_ahead_is_raised_in_its_place(tmp_path: Path) -> None:
    stores = precompute(shapes(tmp_path), Networks(TinyAutoencoder()), SMALL)
    data = latents(tmp_path, num_workers=1)
    data.attach_cache(TinyAutoencoder())
    (stores["latents"].folder / "moments.00002.npy").unlink()  # after the check: rows 6 to 8
    loader, seen = iter(data.train_dataloader()), []
    expected = SerialBatchSampler(N, 5, seed=1).keys_of_step
    while not set(expected(len(seen))[:, 1]) & {6, 7, 8}:
        seen.append(next(loader))
    with pytest.raises(DamagedStore, match=r"moments.00002.npy' cannot be read.*copy it again"):
        next(loader)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_damage_stops(tmp_path: Path, damage: str) -> None:
    data = shapes(tmp_path)
    hurt(precompute(data, Networks(TinyAutoencoder()), SMALL)["latents"].folder, damage)
    with pytest.raises(DamagedStore) as error:
        latents(tmp_path).attach_cache(TinyAutoencoder())
    for word in ("moments.00002.npy", "expected", "rows 6 to 8", "data.on_corrupt=skip"):
        assert word in str(error.value)


@pytest.mark.parametrize("array", ["moments", "index", "caption"])
def test_damage_is_skipped_in_all_stores_alike(tmp_path: Path, array: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = shapes(tmp_path)
    stores = precompute(data, Networks(TinyAutoencoder(), {"main": TinyEncoder()}), SMALL)
    undamaged = torch.cat([batch["index"] for batch in batches(data, 4)])
    hurt(stores["latents"].folder, "truncate", array)
    streams = []
    for _ in range(2):
        capsys.readouterr()
        alone = latents(tmp_path, on_corrupt="skip")
        alone.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
        assert "skipped, 3 of 20 pictures lost" in capsys.readouterr().out
        streams.append(batches(alone, 4))
    seen = torch.cat([batch["index"] for batch in streams[0]])
    lost = {6, 7, 8}
    assert set(seen.tolist()) == set(range(N)) - lost  # one epoch: all others once, and others in place of the lost
    assert all(one == other or other in lost for one, other in zip(seen.tolist(), undamaged.tolist(), strict=True))
    for one, two in zip(*streams, strict=True):
        assert same(one, two)
        images = Shapes(N, 16).load(one["index"].tolist())[0]
        live = torch.from_numpy(images).float() / 255
        torch.testing.assert_close(one["moments_mean"], TinyAutoencoder().encode(live).mean)
        torch.testing.assert_close(one["features/main"].float(), TinyEncoder()(live).data, atol=1e-3, rtol=1e-3)
        assert torch.equal(one["label"], one["index"] % 4)


def test_what_it_lacks_is_said(tmp_path: Path) -> None:
    precompute(shapes(tmp_path), Networks(TinyAutoencoder()), SMALL)
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


@pytest.fixture
def official(images: ImageFolder, tmp_path: Path) -> Path:
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


def test_nothing_is_encoded_again(official: Path, folder: Path, tmp_path: Path) -> None:
    data = ImageFolderDataModule(root=folder, image_size=32, batch_size=12, cache_root=tmp_path / "cache")
    autoencoder = TinyAutoencoder()
    import_repa_latents(data.source, autoencoder, autoencoder.fingerprint, official, data.cache_root)
    precompute(data, Networks(autoencoder))
    assert autoencoder.calls == 1  # the first picture, as a check
    batch = batches(data, 1)[0]
    live = TinyAutoencoder().encode(data.images(batch["index"].tolist()).float() / 255)
    torch.testing.assert_close(batch["moments_mean"], live.mean)
    torch.testing.assert_close(batch["moments_std"], live.std)


def test_other_pictures_labels_or_networks(official: Path, images: ImageFolder, tmp_path: Path) -> None:
    class Other(TinyAutoencoder):
        def encode(self, images: torch.Tensor) -> Gaussian:
            return Gaussian(super().encode(images).mean + 0.1)

    with pytest.raises(UserError, match="differs by 0.100"):
        import_repa_latents(images, Other(), "x", official, tmp_path)
    labels = json.loads((official / "dataset.json").read_text())
    labels["labels"][4][1] = 2
    (official / "dataset.json").write_text(json.dumps(labels))
    with pytest.raises(UserError, match="00000/img-mean-std-00000004.npy' has label 2, the picture has 1"):
        import_repa_latents(images, TinyAutoencoder(), "x", official, tmp_path)
    (official / "00001" / "img-mean-std-00000005.npy").unlink()
    with pytest.raises(UserError, match="found 11 .npy files"):
        import_repa_latents(images, TinyAutoencoder(), "x", official, tmp_path)
