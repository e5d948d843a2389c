"""Cached latents and features equal the live ones, are made once, and are mended when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.cache import CachedOutputs, Making
from datamodules.image_folder import ImageFolder, ImageFolderDataModule
from datamodules.outputs import Outputs
from datamodules.store import ArrayStore, DamagedStore, Manifest
from datamodules.synthetic import Shapes
from repalign.errors import UserError
from repalign.state import Gaussian, Tokens
from tests.data.conftest import TinyAutoencoder, TinyEncoder
from tests.data.stores import SMALL, N, batches, hurt, shapes


@pytest.mark.parametrize("flip", [False, True])
def test_cached_equals_live(tmp_path: Path, flip: bool) -> None:
    autoencoder, encoder = TinyAutoencoder(), TinyEncoder()
    live = shapes(tmp_path, horizontal_flip=flip)
    data = shapes(tmp_path, horizontal_flip=flip, feature_dtype="float32")
    data.attach_cache(autoencoder, {"main": encoder}, making=Making(batch=7, shard_mib=SMALL.shard_mib))
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
    data.attach_cache(TinyAutoencoder(), making=SMALL)
    store = data.stores["latents"]
    assert len(store) == 2 * N
    images = data.images(range(N)).float() / 255
    plain, mirrored = (TinyAutoencoder().encode(view).mean.numpy() for view in (images, images.flip(-1)))
    assert np.allclose(store.gather("moments", range(N))[:, 0], plain)
    assert np.allclose(store.gather("moments", range(N, 2 * N))[:, 0], mirrored)
    assert not np.allclose(plain, mirrored)


def test_features_are_half_precision_on_disk_and_in_batches(tmp_path: Path) -> None:
    data = shapes(tmp_path)
    data.attach_cache(None, {"main": TinyEncoder()})
    assert data.stores["features_main"].manifest.arrays["features/main"].dtype == "float16"
    batch = batches(data, 1)[0]
    assert batch["features/main"].dtype == torch.float16
    live = TinyEncoder()(batch["image"].float() / 255).data
    torch.testing.assert_close(batch["features/main"].float(), live, atol=1e-3, rtol=1e-3)


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
    shapes(tmp_path).attach_cache(first, making=SMALL)
    shapes(tmp_path).attach_cache(second, making=SMALL)
    shapes(tmp_path).attach_cache(other, making=SMALL)
    assert first.calls == N + 1 and second.calls == 0 and other.calls == N + 1  # one for the shapes


def test_stopped_work_is_continued(tmp_path: Path) -> None:
    class Stopped(TinyAutoencoder):
        def encode(self, images: torch.Tensor) -> Gaussian:
            if self.calls > 10:
                raise KeyboardInterrupt
            return super().encode(images)

    with pytest.raises(KeyboardInterrupt):
        shapes(tmp_path).attach_cache(Stopped(), making=Making(batch=3, shard_mib=SMALL.shard_mib))
    (manifest,) = (tmp_path / "cache").rglob("manifest.json")
    done = len(Manifest.load(manifest.parent).files) // 4  # moments, index, label, caption
    assert 0 < done < 7
    with pytest.raises(DamagedStore, match="never written"):
        ArrayStore(manifest.parent)
    rest = TinyAutoencoder()
    data = shapes(tmp_path)
    data.attach_cache(rest, making=SMALL)
    assert rest.calls == N - 3 * done
    whole = TinyAutoencoder().encode(data.images(range(N)).float() / 255).mean.numpy()
    assert np.allclose(data.stores["latents"].whole("moments")[:, 0], whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_only_the_damaged_shard_is_made_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = shapes(tmp_path)
    data.attach_cache(TinyAutoencoder(), making=SMALL)
    good = data.stores["latents"].whole("moments")
    hurt(data.stores["latents"].folder, damage)
    capsys.readouterr()
    again = TinyAutoencoder()
    mended = shapes(tmp_path)
    mended.attach_cache(again, making=SMALL)
    said = capsys.readouterr().out
    assert "moments.00002.npy" in said and "this store is ours" in said
    assert again.calls == (6 if damage == "swap" else 3)
    assert np.array_equal(mended.stores["latents"].whole("moments"), good)


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
    shapes(tmp_path).attach_cache(net, making=SMALL)
    assert net.training and not net.part.training


def test_a_skipped_file_brings_its_replacements_latent_and_label(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / ImageFolder(folder, 32).files[3], 20)
    data = ImageFolderDataModule(
        root=folder, image_size=32, batch_size=12, on_corrupt="skip", cache_root=tmp_path, num_classes=3
    )
    data.attach_cache(TinyAutoencoder(), making=SMALL)
    batch = batches(data, 1)[0]
    assert 3 not in batch["index"] and (batch["index"] == 4).sum() == 2
    assert torch.equal(batch["label"], torch.from_numpy(data.source.labels)[batch["index"]])
    live = TinyAutoencoder().encode(data.images(batch["index"].tolist()).float() / 255)
    torch.testing.assert_close(batch["moments_mean"], live.mean)


def test_writers_refuse_wrong_shapes(tmp_path: Path) -> None:
    """A network whose output depends on the batch would otherwise be stored under a wrong shape."""
    calls: list[int] = []

    def compute(images: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(images))
        return {"x": torch.zeros(len(images), len(calls))}

    outputs = Outputs("x", None, "x", compute, "float32", "data.latent_dtype")
    with pytest.raises((AssertionError, ValueError)):
        CachedOutputs(Shapes(N, 16), outputs, tmp_path, making=Making(batch=2)).store()
