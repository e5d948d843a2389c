import numpy as np
import PIL.Image
import pytest
import torch

from datamodules.images import center_crop, to_picture, to_pixels, to_unit


def picture(width: int, height: int) -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


@pytest.mark.parametrize(("width", "height"), [(16, 16), (17, 40), (100, 33), (16, 15), (7, 9)])
def test_the_crop_is_a_square_of_the_size(width, height):
    assert center_crop(picture(width, height), 16).size == (16, 16)


def test_the_right_size_is_left_alone():
    image = picture(16, 16)
    assert np.array_equal(np.array(center_crop(image, 16)), np.array(image))


def test_the_middle_is_kept():
    values = np.zeros((16, 48, 3), dtype=np.uint8)
    values[:, 16:32] = 255
    assert (np.array(center_crop(PIL.Image.fromarray(values), 16)) == 255).all()


def test_pictures_and_bytes_round_trip():
    image = picture(5, 4)
    pixels = to_pixels(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 4, 5)
    assert np.array_equal(np.array(to_picture(pixels)), np.array(image))
    assert to_unit(pixels).max() <= 1
    torch.testing.assert_close(to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0, 0.2, 1]))


def test_grey_becomes_colour_and_transparent_becomes_white():
    assert to_pixels(PIL.Image.new("L", (2, 2), 7)).eq(7).all()
    assert to_pixels(PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 0))).eq(255).all()
