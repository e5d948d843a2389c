"""COCO's layout: boxes in the centre square, order of classes, mirrored batches, examples for drawing."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.coco import CocoDataModule, CocoPictures
from datamodules.examples import examples_of
from datamodules.sampler import SerialBatchSampler
from repalign.errors import UserError
from repalign.random import SampleRandom


@pytest.fixture
def coco(tmp_path):
    """Two pictures, 40 x 20 and 20 x 40; the second has no object, the first three."""
    for name, size in (("b.png", (40, 20)), ("a.png", (20, 40))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    content = {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 20},
            {"id": 3, "file_name": "a.png", "width": 20, "height": 40},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [15, 5, 10, 10]},  # inside the square, which begins at 10
            {"image_id": 7, "category_id": 90, "bbox": [0, 0, 20, 20]},  # half of it outside
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 10.5, 4]},  # a twentieth inside
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return {"root": tmp_path, "annotations": tmp_path / "instances.json", "image_size": 16}


def test_boxes_follow_the_centre_square(coco):
    source = CocoPictures(**coco, objects=2)
    assert source.files == ["a.png", "b.png"] and source.object_names == ["person", "brush"]
    boxes = source.boxes([1, 0])
    np.testing.assert_allclose(boxes[0], [[1, 0, 0, 0.5, 1], [0, 0.25, 0.25, 0.75, 0.75]], atol=1e-6)
    assert (boxes[1] == -1).all() and boxes.dtype == np.float32
    assert source.load([0])[0].shape == (1, 3, 16, 16)
    other = {**coco, "image_size": 8}
    assert CocoPictures(**other).fingerprint != CocoPictures(**coco).fingerprint


def test_batches_carry_boxes_and_mirror_them_with_the_picture(coco):
    data = CocoDataModule(**coco, batch_size=64, horizontal_flip=True, objects=2)
    keys = next(iter(SerialBatchSampler(len(data.dataset), 64)))
    batch = data.dataset.__getitems__(np.asarray(keys))
    first = batch["boxes"][torch.as_tensor(batch["index"]) == 1, 0]
    plain, mirrored = torch.tensor([1, 0, 0, 0.5, 1]), torch.tensor([1, 0.5, 0, 1, 1])
    is_plain, is_mirrored = ((first - row).abs().amax(1) < 1e-6 for row in (plain, mirrored))
    assert bool((is_plain ^ is_mirrored).all()) and is_plain.any() and is_mirrored.any()
    assert (batch["boxes"][torch.as_tensor(batch["index"]) == 0] == -1).all()


def test_examples_depend_on_the_serial_number_alone(coco):
    data = CocoDataModule(**coco, batch_size=2)
    labels = torch.zeros(6, dtype=torch.int64)
    whole = examples_of(data, labels, SampleRandom(0, range(6)), with_images=True)
    part = examples_of(data, labels[4:], SampleRandom(0, [4, 5]), with_images=False)
    assert torch.equal(whole["boxes"][4:], part["boxes"]) and "image" not in part
    assert whole["image"].shape == (6, 3, 16, 16) and set(whole["index"].tolist()) == {0, 1}


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("{}", "not COCO's"), (None, "no file")])
def test_other_files_are_refused(coco, text, message):
    if text is None:
        coco["annotations"] = None
    else:
        coco["annotations"].write_text(text)
    with pytest.raises(UserError, match=f"data.annotations: .*{message}"):
        CocoPictures(**coco)
