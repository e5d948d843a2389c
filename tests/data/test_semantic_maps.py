"""Folders of pictures and maps: cut alike, classes never mixed, mirrored together, one line for what does not fit."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.examples import examples_of
from datamodules.sampler import SerialBatchSampler
from datamodules.semantic_maps import SemanticMaps, SemanticMapsDataModule
from repalign.conditioners.maps import SemanticMapConditioner
from repalign.errors import UserError
from repalign.random import SampleRandom
from tests.smoke.test_recipes_train import column, train


@pytest.fixture
def folders(tmp_path):
    """Two pictures whose red is the class of the pixel x 40, in the layout of ADE20K; the second map has a palette."""
    rng = np.random.default_rng(0)
    for name, (height, width), mode in (("a/one.jpg", (40, 24), "L"), ("a/b/two.png", (24, 60), "P")):
        classes = np.kron(rng.integers(0, 5, (height // 4, width // 4)), np.ones((4, 4))).astype(np.uint8)
        picture, map_ = tmp_path / "pictures" / name, (tmp_path / "maps" / name).with_suffix(".png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        map_.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([classes * 40] * 3, -1)).save(
            picture, **({"quality": 100} if name.endswith("jpg") else {})
        )
        numbers = Image.fromarray(classes)
        if mode == "P":
            numbers = numbers.convert("P")
            numbers.putpalette([255 - k // 3 for k in range(768)])
        numbers.save(map_)
    return {"root": tmp_path / "pictures", "maps": tmp_path / "maps", "classes": 5}


def test_a_map_is_cut_as_its_picture_and_never_mixed(folders):
    source = SemanticMaps(**folders, image_size=24)
    assert source.files == ["a/b/two.png", "a/one.jpg"]
    maps, (images, _) = source.segmentation([0, 1]), source.load([0, 1])
    assert maps.dtype == np.int64 and maps.shape == (2, 24, 24) and set(np.unique(maps)) <= set(range(5))
    # Cut without resampling: the picture says the class of every pixel (the JPEG up to its rounding).
    assert (np.abs(images[:, 0].astype(int) - 40 * maps) <= 12).all() and (images[0, 0] == 40 * maps[0]).all()
    smaller = SemanticMaps(**folders, image_size=12)
    halved = smaller.segmentation([0, 1])
    assert set(np.unique(halved)) <= set(range(5))
    blocks = maps.reshape(2, 12, 2, 12, 2)  # classes come in squares of four: halving keeps them but at their borders
    same = (blocks == blocks[:, :, :1, :, :1]).all((2, 4))
    assert (halved == blocks[:, :, 0, :, 0])[same].all() and same.mean() > 0.9
    assert smaller.fingerprint != source.fingerprint


def test_offset_and_void_give_minus_one_and_no_class(folders):
    shifted = SemanticMaps(**{**folders, "classes": 4}, image_size=24, offset=1, void=0).segmentation([0])
    plain = SemanticMaps(**folders, image_size=24).segmentation([0])
    assert (shifted == plain - 1).all() and (shifted == -1).any()
    conditioner = SemanticMapConditioner(type("A", (), {"downsampling": 4})(), classes=4, channels=3)
    with torch.no_grad():
        out = conditioner({"segmentation": torch.from_numpy(np.full_like(shifted, -1))}).spatial
    assert out.shape == (1, 3, 6, 6) and float(out.abs().max()) == 0


def test_batches_and_examples_carry_maps_and_mirror_them(folders):
    data = SemanticMapsDataModule(**folders, image_size=24, batch_size=32, horizontal_flip=True)
    batch = data.dataset.__getitems__(np.asarray(next(iter(SerialBatchSampler(len(data.dataset), 32)))))
    own = torch.as_tensor(batch["index"]) == 0
    assert (batch["image"][own][:, 0].long() == 40 * batch["segmentation"][own]).all()
    assert len({batch["segmentation"][i].numpy().tobytes() for i in own.nonzero()[:, 0]}) == 2
    drawn = examples_of(data, torch.zeros(3, dtype=torch.long), SampleRandom(0, [4, 5, 6]), with_images=False)
    assert drawn["segmentation"].shape == (3, 24, 24)


def spoil(folders, picture):
    picture.save(folders["maps"] / "a/one.png")


def unmapped(folders):
    (folders["maps"] / "a/one.png").unlink()


MISTAKES = {
    r"1 of 2 pictures have no map, the first is '.*a/one.jpg'; expected '.*a/one.png'": unmapped,
    r"'.*one.png' has 10x40 pixels, its picture '.*one.jpg' has 24x40": lambda f: spoil(f, Image.new("L", (10, 40))),
    r"'.*one.png' has the value 7, expected 0 to 4, or 255 for none": lambda f: spoil(f, Image.new("L", (24, 40), 7)),
    r"'.*one.png' has 3 channels, expected one of class": lambda f: spoil(f, Image.new("RGB", (24, 40))),
    r"data.maps: cannot read '.*one.png'": lambda f: (f["maps"] / "a/one.png").write_bytes(b"no picture"),
    r"data.maps: no folder '.*none'": lambda f: f.update(maps=f["maps"] / "none"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_does_not_fit_is_one_line(folders, message):
    MISTAKES[message](folders)
    with pytest.raises(UserError, match=message) as caught:
        SemanticMaps(**folders, image_size=24).segmentation([0, 1])
    assert "\n" not in str(caught.value)


def test_the_recipe_trains_on_a_folder(folders, tmp_path):
    words = ["data=semantic_maps", "~data.size", f"data.root={folders['root']}", f"data.maps={folders['maps']}"]
    words += ["conditioner.classes=5", "data.upscale=true", "data.batch_size=2", "data.num_workers=0"]
    run_dir = train(tmp_path / "runs", "experiment=ldm_semantic", *words)
    assert len(column(run_dir, "train/loss")) == 2
