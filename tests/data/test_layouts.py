"""Latents of other codes: the batches of our own stores, from files in their true form; what is wrong is named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from datamodules.image_folder import ImageFolder, ImageFolderDataModule
from datamodules.latents import LatentDataModule
from datamodules.layouts.module import ForeignLatentDataModule
from repalign.autoencoders.latent_norm import statistics_from_file
from repalign.errors import UserError
from tasks.instantiate import build
from tasks.precompute import Networks, precompute
from tests.data.conftest import TinyAutoencoder, TinyEncoder
from tests.data.foreign import LAYOUTS
from tests.data.stores import batches

CONF = str(Path(__file__).parents[2] / "conf")
EXACT = ("label", "index", "serial")
N = 12


def foreign(name: str, root: Path, **options: object) -> ForeignLatentDataModule:
    common = {"image_size": 32, "batch_size": 5, "seed": 1, "layout": LAYOUTS[name][1]}
    return ForeignLatentDataModule(root=root, **{**common, **options})


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def files(layout: str, images: ImageFolder, tmp_path: Path) -> Path:
    return LAYOUTS[layout][0](tmp_path / "foreign", images, TinyAutoencoder().encode)


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> LatentDataModule:
    """Our store of the same pictures, both views."""
    data = ImageFolderDataModule(
        root=folder, image_size=32, batch_size=5, horizontal_flip=True, cache_root=tmp_path / "own"
    )
    precompute(data, Networks(TinyAutoencoder()))
    return LatentDataModule(root=next((tmp_path / "own").iterdir()), image_size=32, batch_size=5, seed=1)


def check_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], layout: str) -> None:
    assert {*EXACT, "moments_mean"} <= one.keys()
    assert one.keys() == two.keys() - ({"moments_std"} if layout == "lightningdit" else set())
    assert all(torch.equal(one[key], two[key]) for key in EXACT)
    assert all(one[key].dtype == torch.float32 for key in one.keys() - set(EXACT))
    # The logarithm of DDT's variances is rounded.
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if layout == "ddt" else {"atol": 0, "rtol": 0}
    for key in one.keys() - set(EXACT):
        torch.testing.assert_close(one[key], two[key], **tolerance)


def test_the_batches_of_our_own_store(layout: str, files: Path, own: LatentDataModule) -> None:
    """Order over several epochs, resume in the middle of one, and two workers."""
    flip = layout == "lightningdit"
    own.horizontal_flip = flip
    own.attach_cache(TinyAutoencoder())
    expected = batches(own, 9)
    data = foreign(layout, files, horizontal_flip=flip)
    data.attach_cache(TinyAutoencoder())
    assert data.num_classes == 3 and len(data.dataset) == N
    for one, two in zip(batches(data, 9), expected, strict=True):
        check_same(one, two, layout)
    resumed = foreign(layout, files, horizontal_flip=flip, num_workers=2)
    resumed.set_start(3)
    resumed.attach_cache(TinyAutoencoder())
    for one, two in zip(batches(resumed, 6), expected[3:], strict=True):
        check_same(one, two, layout)


def test_what_is_told(layout: str, files: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign(layout, files).attach_cache(TinyAutoencoder())
    told = capsys.readouterr().out
    assert "nothing in it says which autoencoder made it; 12 latents 3x8x8" in told
    assert ("latents_stats.pt" in told) == (layout == "lightningdit")
    paired = foreign(layout, files, images=folder)
    autoencoder = TinyAutoencoder()
    paired.attach_cache(autoencoder)
    told = capsys.readouterr().out
    assert ("the first picture's latent is this one's" in told) == (layout != "lightningdit")
    assert autoencoder.calls == (0 if layout == "lightningdit" else 1)


def test_pictures_beside(layout: str, files: Path, folder: Path, images: ImageFolder, tmp_path: Path) -> None:
    """Encoders run on the pictures of the latents, live or from the cache."""
    data = foreign(layout, files, images=folder, cache_root=tmp_path / "cache", cache_features=True, keep_images=True)
    data.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    batch = batches(data, 1)[0]
    pixels = torch.from_numpy(images.load(batch["index"].tolist())[0])
    assert torch.equal(batch["image"], pixels)
    live = TinyEncoder()(pixels.float() / 255).data
    torch.testing.assert_close(batch["features/main"].float(), live, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(batch["moments_mean"], TinyAutoencoder().encode(pixels.float() / 255).mean)
    data = foreign(layout, files, images=folder)
    data.attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    assert "image" in batches(data, 1)[0]


def test_other_pictures_or_autoencoders(layout: str, files: Path, folder: Path) -> None:
    class Wide(TinyAutoencoder):
        channels = 4

    class Other(TinyAutoencoder):
        def encode(self, images: torch.Tensor):
            return super().encode(images + 1)

    with pytest.raises(UserError, match="data.root: latents in .* are 3x8x8, but this autoencoder makes 4x8x8"):
        foreign(layout, files).attach_cache(Wide())
    with pytest.raises(UserError, match="3x8x8, .* makes 3x16x16 of data.image_size=64"):
        foreign(layout, files, image_size=64).attach_cache(TinyAutoencoder())
    if layout != "lightningdit":
        with pytest.raises(UserError, match="the first latent .* differs by"):
            foreign(layout, files, images=folder).attach_cache(Other())
    with pytest.raises(UserError, match="data.images: encoders need pictures.*data.images=FOLDER"):
        foreign(layout, files).attach_cache(TinyAutoencoder(), {"main": TinyEncoder()})
    with pytest.raises(UserError, match="data.images: pictures are needed"):
        next(foreign(layout, files).reference_images(4))
    if layout != "lightningdit":
        with pytest.raises(UserError, match="data.horizontal_flip: .* no latents of mirrored pictures"):
            foreign(layout, files, horizontal_flip=True).attach_cache(TinyAutoencoder())
    (folder / "n01440764" / "n01440764_0.png").rename(folder / "n01484850" / "n01440764_0.png")
    with pytest.raises(UserError, match="data.root: .* has label 0, the picture has 1"):
        foreign(layout, files, images=folder).setup()
    (folder / "n01484850" / "n01440764_0.png").unlink()
    with pytest.raises(UserError, match="found 12 latents .*, expected 11"):
        foreign(layout, files, images=folder).setup()


def test_converted_into_our_own_store(layout: str, files: Path, own: LatentDataModule, tmp_path: Path) -> None:
    """Through task=precompute; data=latents reads the result."""
    flip = layout == "lightningdit"
    options = {"convert": True, "cache_root": tmp_path / "cache", "horizontal_flip": flip}
    stores = precompute(foreign(layout, files, **options), Networks(TinyAutoencoder()))
    stored = LatentDataModule(
        root=stores["latents"].folder.parent, image_size=32, batch_size=5, seed=1, horizontal_flip=flip
    )
    own.horizontal_flip = flip
    for data in (stored, own):
        data.attach_cache(TinyAutoencoder())
    assert stored.num_classes == 3 and len(stored.dataset) == N
    for one, two in zip(batches(stored, 4), batches(own, 4), strict=True):
        check_same(one, two, layout)


def test_wrong_roots(layout: str, files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.root: has no value.*REPALIGN_LATENTS"):
        foreign(layout, None).setup()
    with pytest.raises(UserError, match="data.root: no file or folder"):
        foreign(layout, tmp_path / "absent").setup()
    (tmp_path / "empty").mkdir()
    words = {"repa": "no .*dataset.json", "repa_e": "is a folder, expected one .h5"}
    words |= {"lightningdit": "no .safetensors", "ddt": "neither a folder per class"}
    with pytest.raises(UserError, match=words[layout]):
        foreign(layout, tmp_path / "empty").setup()
    expected = "found 3 classes" if layout == "ddt" else "label 2 of picture 8, expected 0 to 1"
    with pytest.raises(UserError, match=expected):
        foreign(layout, files, num_classes=2).setup()


def test_files_are_opened_by_the_process_that_reads(layout: str, files: Path) -> None:
    data = foreign(layout, files)
    data.attach_cache(TinyAutoencoder())
    rows = data.stores["latents"]
    before = rows.gather("moments_mean", [3, 1])
    assert np.array_equal(pickle.loads(pickle.dumps(rows)).gather("moments_mean", [3, 1]), before)
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(rows.gather("moments_mean", [1, 3]), before[::-1]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def only(request: pytest.FixtureRequest, images: ImageFolder, tmp_path: Path) -> Path:
    """Files of one layout, named by the test's parameter."""
    return LAYOUTS[request.param][0](tmp_path / "foreign", images, TinyAutoencoder().encode)


@pytest.mark.parametrize("only", ["repa"], indirect=True)
def test_mistakes_in_repas_folder(only: Path) -> None:
    first, later = only / "00000" / "img-mean-std-00000000.npy", only / "00001" / "img-mean-std-00000006.npy"
    data = foreign("repa", only)
    data.setup()
    good = np.load(later)
    for content, words in (
        (good[:, :4], r"00000006.npy' has shape \(3, 4, 8\), the first row \(3, 8, 8\)"),
        (good[:5], r"00000006.npy' is float32 \(5, 8, 8\), expected floats \[2C, h, w\]"),
        (good.astype(np.int64), "is int64"),
        (np.full_like(good, np.nan), "not finite"),
    ):
        np.save(later, content)
        with pytest.raises(UserError, match=words):
            data.files.moments(6)
    later.write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read .*00000006.npy'.*restore the file"):
        data.files.moments(6)
    np.save(later, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read .*00000006.npy'"):
        data.files.moments(6)
    later.unlink()
    with pytest.raises(UserError, match="found 11 .npy files .* lists 12; the first that is missing is '00001/img"):
        foreign("repa", only).setup()
    np.save(later, good)
    np.save(only / "00001" / "extra.npy", good)
    with pytest.raises(UserError, match="has no label for 1 of 13 files, the first is '00001/extra.npy'"):
        foreign("repa", only).setup()
    (only / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match="dataset.json' has no labels"):
        foreign("repa", only).setup()
    (only / "dataset.json").write_text("[")
    with pytest.raises(UserError, match="dataset.json' is not of the form"):
        foreign("repa", only).setup()
    assert first.is_file()


@pytest.mark.parametrize("only", ["repa_e"], indirect=True)
def test_mistakes_in_repa_es_file(only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics = only.with_name("repae-invae-400k-latents-stats.pt")
    torch.save({"latents_scale": torch.ones(1, 3, 1, 1), "latents_bias": torch.zeros(1, 3, 1, 1)}, statistics)
    data = foreign("repa_e", only)
    data.attach_cache(TinyAutoencoder())
    data.files._close()  # HDF5 refuses to change a file that is open
    assert f"autoencoder.norm.path={statistics}" in capsys.readouterr().out
    with pytest.raises(UserError, match="it holds repae-invae-400k.h5"):
        foreign("repa_e", only.parent).setup()
    with h5py.File(only, "a") as file:
        del file["00001/img-mean-std-00000006.npy"]
    with pytest.raises(UserError, match="found 11 arrays .* dataset.json lists 12"):
        foreign("repa_e", only).setup()
    with h5py.File(only, "a") as file:
        file["00001/other.npy"] = np.zeros((6, 8, 8), np.float32)
    data = foreign("repa_e", only)
    data.setup()
    with pytest.raises(UserError, match="cannot read '00001/img-mean-std-00000006.npy' in"):
        data.files.moments(6)
    data.files._close()
    with h5py.File(only, "a") as file:
        del file["dataset.json"]
    with pytest.raises(UserError, match="has no 'dataset.json'"):
        foreign("repa_e", only).setup()
    only.write_bytes(only.read_bytes()[:500])
    with pytest.raises(UserError, match="is no HDF5 file, or torn"):
        foreign("repa_e", only).setup()


@pytest.mark.parametrize("only", ["lightningdit"], indirect=True)
def test_mistakes_in_lightningdits_shards(only: Path) -> None:
    norm = statistics_from_file(only / "latents_stats.pt")
    whole = torch.cat([load_file(path)["latents"] for path in sorted(only.glob("*.safetensors"))])
    assert norm.normalize(whole).std(dim=(0, 2, 3)).sub(1).abs().max() < 1e-3
    path = only / "latents_rank00_shard001.safetensors"
    good = load_file(path)
    save_file({"latents": good["latents"], "latents_flip": good["latents_flip"]}, path)
    with pytest.raises(UserError, match="shard001.safetensors' has no 'labels'; it holds latents, latents_flip"):
        foreign("lightningdit", only).setup()
    save_file({**good, "labels": good["labels"][:3].clone()}, path)
    with pytest.raises(UserError, match=r"has 5 latents but labels of shape \(3,\)"):
        foreign("lightningdit", only).setup()
    save_file({**good, "latents": good["latents"][:, :2].clone()}, path)
    data = foreign("lightningdit", only)
    data.setup()
    with pytest.raises(UserError, match=r"'latents' of .*shard001.*row 1 has shape \(2, 8, 8\)"):
        data.files.moments(6)
    # In half precision, and without the mirrored view: read as float32, one view.
    save_file({"latents": good["latents"].bfloat16(), "labels": good["labels"]}, path)
    data = foreign("lightningdit", only)
    data.setup()
    assert not data.files.has_views and data.files.moments(6)["moments_mean"].dtype == np.float32
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read .*shard001"):
        foreign("lightningdit", only).setup()


@pytest.mark.parametrize("only", ["ddt"], indirect=True)
def test_mistakes_in_ddts_files(only: Path) -> None:
    data = foreign("ddt", only)
    assert list(data.class_names) == ["n01440764", "n01443537", "n01484850"]
    path = only / data.files.names[5]
    good = torch.load(path, weights_only=True)
    half = {name: value.half() for name, value in good.items()}
    torch.save(half, path)
    assert data.files.moments(5)["moments_std"].dtype == np.float32
    extreme = {**good, "logvar": torch.full_like(good["logvar"], -100)}
    torch.save(extreme, path)
    assert np.allclose(data.files.moments(5)["moments_std"], np.exp(-15), rtol=1e-5)
    for content, words in (
        ({"mean": good["mean"]}, "holds mean, expected tensors 'mean' and 'logvar'"),
        (good["mean"], "holds Tensor, expected"),
        ({**good, "logvar": good["logvar"][:2]}, "has mean .*, logvar"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=words):
            data.files.moments(5)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot read .*restore the file"):
        data.files.moments(5)
    path.write_bytes(pickle.dumps(print, protocol=2))
    with pytest.raises(UserError, match="cannot read"):
        data.files.moments(5)


def test_configurations_build(layout: str, files: Path) -> None:
    overrides = [f"data=latents_{layout}", f"data.root={files}", "data.image_size=32", "seed=3", "data.batch_size=4"]
    overrides += ["data.num_classes=3", "data.num_workers=0", "paths=default"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    data = build(cfg.data, "data")
    data.horizontal_flip = False
    data.attach_cache(TinyAutoencoder())
    assert data.seed == 3 and data.num_classes == 3 and batches(data, 1)[0]["moments_mean"].shape == (4, 3, 8, 8)
