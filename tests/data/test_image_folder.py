"""ImageNet in miniature, whole and damaged."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from datamodules.image_folder import ImageFolder, ImageFolderDataModule
from datamodules.images import center_crop, to_pixels
from repalign.errors import UserError

CONF = str(Path(__file__).parents[2] / "conf")


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_classes_are_the_sorted_folders(images: ImageFolder) -> None:
    assert images.class_names == ["n01440764", "n01443537", "n01484850"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.files == sorted(images.files)


def test_pictures_are_the_centre_crop(folder: Path, images: ImageFolder) -> None:
    loaded, index = images.load([0, 5, 11])
    assert loaded.shape == (3, 3, 32, 32) and loaded.dtype == np.uint8 and index.tolist() == [0, 5, 11]
    for pixels, i in zip(loaded, index, strict=True):
        with PIL.Image.open(folder / images.files[i]) as picture:
            assert (pixels == to_pixels(center_crop(picture, 32)).numpy()).all()


def test_other_modes_become_rgb(folder: Path) -> None:
    """Grey, palette and transparent pictures, and the CMYK JPEG files that ImageNet has."""
    for number, mode in enumerate(("L", "P", "RGBA", "CMYK")):
        picture = PIL.Image.new("RGB", (33, 32), (200, 10, 10)).convert(mode)
        picture.save(folder / "n01440764" / f"z{number}.{'jpeg' if mode == 'CMYK' else 'png'}")
    source = ImageFolder(folder, 32)
    pixels = source.load([i for i, file in enumerate(source.files) if "/z" in file])[0].astype(int)
    assert pixels.shape == (4, 3, 32, 32)
    assert (np.ptp(pixels[0], axis=0) == 0).all()
    assert np.abs(pixels[1:].mean(axis=(2, 3)) - [200, 10, 10]).max() < 6


def test_labels_from_a_list(folder: Path) -> None:
    names = ["n01443537/n01443537_0.png", "n01440764/n01440764_1.JPEG"]
    (folder / "dataset.json").write_text(json.dumps({"labels": [[names[0], 4], [names[1], 0]]}))
    source = ImageFolder(folder, 32)
    assert source.files == sorted(names) and source.labels.tolist() == [0, 4] and len(source.class_names) == 5
    assert source.load([0, 1])[0].shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    "text,words",
    [
        ('{"labels": [["a.png", -1]]}', ("label -1", "0 or more")),
        ('{"labels": [["../a.png", 1]]}', ("'../a.png'", "below")),
        ('{"labels": null}', ("not of the form",)),
        ('{"labels": [', ("not of the form",)),
        ('{"labels": []}', ("no picture",)),
    ],
)
def test_bad_lists(folder: Path, text: str, words: tuple[str, ...]) -> None:
    (folder / "dataset.json").write_text(text)
    with pytest.raises(UserError) as error:
        ImageFolder(folder, 32)
    assert all(word in str(error.value) for word in ("data.root", "dataset.json", *words))


def test_corrupt_file_stops(folder: Path, images: ImageFolder) -> None:
    tear(folder / images.files[5])
    with pytest.raises(UserError) as error:
        images.load([4, 5])
    assert images.files[5] in str(error.value) and "data.on_corrupt=skip" in str(error.value)


def test_no_picture_at_all_stops(folder: Path, images: ImageFolder) -> None:
    (folder / images.files[0]).write_text("not a picture")
    with pytest.raises(UserError, match="cannot read"):
        images.load([0])


def test_corrupt_files_are_skipped_counted_and_replaced(
    folder: Path, images: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    good = images.load(range(12))[0]
    for i in (3, 4, 11):
        tear(folder / images.files[i])
    source = ImageFolder(folder, 32, on_corrupt="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loaded, index = source.load([2, 3, 4, 11])
    assert index.tolist() == [2, 5, 5, 0]
    assert (loaded == good[index]).all()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"skipped ({n} so far of 12)" for n in (1, 2, 3)
    ]


def test_a_replaced_picture_brings_its_label(folder: Path, images: ImageFolder) -> None:
    tear(folder / images.files[3])
    data = ImageFolderDataModule(root=folder, image_size=32, batch_size=12, on_corrupt="skip")
    batch = next(iter(data.train_dataloader()))
    assert 3 not in batch["index"] and (batch["index"] == 4).sum() == 2
    assert batch["label"].tolist() == images.labels[batch["index"].numpy()].tolist()


def test_nothing_readable(folder: Path, images: ImageFolder) -> None:
    for file in images.files:
        (folder / file).write_bytes(b"")
    with pytest.raises(UserError, match="none of the 12 pictures"):
        ImageFolder(folder, 32, on_corrupt="skip").load([0])


def test_too_small(folder: Path) -> None:
    with pytest.raises(UserError) as error:
        ImageFolder(folder, 64, on_corrupt="skip").load([0])
    for word in ("data.image_size", "n01440764_0.png", "40x32", "64x64", "data.upscale=true"):
        assert word in str(error.value)
    assert ImageFolder(folder, 64, upscale=True).load([0])[0].shape == (1, 3, 64, 64)


def test_wrong_roots(tmp_path: Path, folder: Path) -> None:
    cases = {
        None: "data.root: has no value",
        str(tmp_path / "absent"): "data.root: no folder",
        str(folder / "n01440764"): "neither a folder per class nor a dataset.json",
    }
    for root, words in cases.items():
        with pytest.raises(UserError, match=words):
            ImageFolder(root, 32)
    with pytest.raises(UserError, match="REPALIGN_IMAGENET"):
        ImageFolder(None, 32)
    (folder / "n02000000").mkdir()
    with pytest.raises(UserError, match="n02000000.*has no picture"):
        ImageFolder(folder, 32)


def test_wrong_number_of_classes_and_unknown_policy(folder: Path) -> None:
    with pytest.raises(UserError, match="found 3 classes.*data.num_classes=1000"):
        ImageFolder(folder, 32, num_classes=1000)
    with pytest.raises(UserError, match="data.on_corrupt.*Did you mean 'skip'"):
        ImageFolder(folder, 32, on_corrupt="skipp")


def test_fingerprint_follows_content(folder: Path, images: ImageFolder) -> None:
    assert ImageFolder(folder, 32).fingerprint == images.fingerprint != ImageFolder(folder, 16).fingerprint
    tear(folder / images.files[0])
    assert ImageFolder(folder, 32).fingerprint != images.fingerprint


@pytest.mark.parametrize("group", ["openmoji", "imagenet", "image_folder", "latents", "synthetic"])
def test_recipes_build(group: str, folder: Path, openmoji_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REPALIGN_IMAGENET", raising=False)
    monkeypatch.setenv("REPALIGN_CACHE", str(openmoji_cache))
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", overrides=[f"data={group}", "paths=default", "seed=3"])
    data = instantiate(cfg.data, _convert_="all")
    assert data.seed == 3
    if group == "imagenet":
        with pytest.raises(UserError, match="data.root: has no value.*REPALIGN_IMAGENET"):
            data.num_classes
        monkeypatch.setenv("REPALIGN_IMAGENET", str(folder))
        with pytest.raises(UserError, match="1000"):
            instantiate(cfg.data, _convert_="all").num_classes
