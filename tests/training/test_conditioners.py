"""Conditioners: shapes, null conditions, dropout, and what they say when the data lack something."""

import pytest
import torch

from repalign.autoencoders.latent_norm import ScaleShift
from repalign.conditioners.derive import derived
from repalign.conditioners.hybrid import HybridConditioner
from repalign.conditioners.label import LabelConditioner
from repalign.conditioners.label_token import LabelTokenConditioner
from repalign.conditioners.layout import LayoutConditioner
from repalign.conditioners.maps import (
    InpaintingConditioner,
    LowResolutionConditioner,
    SemanticMapConditioner,
    random_boxes,
)
from repalign.conditioners.text import TextConditioner
from repalign.encoders.text_sd3 import RandomTextEncoder
from repalign.errors import UserError
from repalign.random import SampleRandom
from repalign.state import Cond, Gaussian


class Halver:
    """An autoencoder that averages squares of 4 x 4 pixels."""

    downsampling, channels, norm = 4, 3, ScaleShift(2.0, 0.5)

    def encode(self, images):
        return Gaussian(torch.nn.functional.avg_pool2d(images, 4))


def batch(count=3):
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {
        "label": torch.arange(count),
        "serial": torch.arange(count) + 7,
        "caption": ["a red ring", "a blue square", "a ring"][:count],
        "image": images,
        "boxes": torch.tensor([[[1, 0.1, 0.2, 0.5, 0.6], [0, 0.0, 0.0, 1.0, 1.0]]]).repeat(count, 1, 1),
        "segmentation": torch.randint(0, 5, (count, 16, 16), generator=torch.Generator().manual_seed(1)),
    }


TEXTS = {"main": RandomTextEncoder(6, length=4)}
MAKE = {
    "label": lambda: LabelConditioner(10),
    "label_token": lambda: LabelTokenConditioner(10, 8),
    "text": lambda: TextConditioner(TEXTS),
    "superres": lambda: LowResolutionConditioner(Halver()),
    "inpaint": lambda: InpaintingConditioner(Halver()),
    "semantic": lambda: SemanticMapConditioner(Halver(), 5),
    "layout": lambda: LayoutConditioner(4, objects=3, grid=8, dim=8, depth=1, heads=2),
}


@pytest.mark.parametrize("name", MAKE)
def test_conditions_have_the_promised_widths_and_the_null_completes_them(name):
    conditioner = MAKE[name]()
    cond = conditioner(batch())
    assert (None if cond.text is None else cond.text.data.shape[-1]) == conditioner.context_dim
    assert (0 if cond.spatial is None else cond.spatial.shape[1]) == conditioner.concat_channels
    null = conditioner.null(3, torch.device("cpu")).completed(cond)
    both = cond.concatenate(null)
    for entry in (both.label, both.spatial, None if both.text is None else both.text.data):
        assert entry is None or len(entry) == 6
    if cond.spatial is not None:
        assert torch.equal(null.spatial, cond.spatial)


@pytest.mark.parametrize("name", ["label", "label_token", "text", "layout"])
def test_dropped_samples_have_the_null_condition_and_about_a_tenth_is_dropped(name):
    conditioner = MAKE[name]()
    if isinstance(conditioner, torch.nn.Module):
        conditioner.eval()
    drawn = conditioner.draw_drop(SampleRandom(0, range(2000)))
    ((key, values),) = drawn.items()
    assert 0.07 < float(values.float().mean()) < 0.13
    drop = torch.tensor([True, False, True])
    cond, null, kept = conditioner(batch(), {key: drop}), conditioner.null(3, drop.device), conditioner(batch())

    def values_of(c: Cond):
        return c.label.float() if c.text is None else c.text.data

    torch.testing.assert_close(values_of(cond)[drop], values_of(null)[drop])
    torch.testing.assert_close(values_of(cond)[~drop], values_of(kept)[~drop])
    assert not torch.allclose(values_of(kept)[drop], values_of(null)[drop])


def test_stored_text_is_read_instead_of_the_caption():
    conditioner = TextConditioner(TEXTS)
    stored = torch.ones(3, 4, 6, dtype=torch.float16)
    seen = conditioner({"text/main": stored, "text_mask/main": torch.ones(3, 4, dtype=torch.uint8)})
    assert seen.text.data.dtype == torch.float32 and seen.text.data.shape == (3, 4, 6)
    with pytest.raises(UserError, match="reads captions, and these data have none"):
        conditioner({})
    with pytest.raises(UserError, match=r"text_encoders: none, and the conditioner reads 'main'"):
        TextConditioner({}, "main")


def test_the_small_picture_is_the_mean_of_its_squares():
    spatial = LowResolutionConditioner(Halver(), "area")(batch()).spatial
    torch.testing.assert_close(spatial, 2 * Halver().encode(batch()["image"] / 255).mean - 1)
    with pytest.raises(UserError, match=r"conditioner.method: unknown method 'cubic'"):
        LowResolutionConditioner(Halver(), "cubic")


def test_inpainting_hides_the_hole_and_shows_the_rest():
    mask = torch.zeros(3, 1, 16, 16)
    mask[..., :8] = 1
    one, other = batch(), batch()
    other["image"] = other["image"].clone()
    other["image"][..., :8] = 0  # differs in the hole alone
    conditioner = InpaintingConditioner(Halver())
    found, same = (conditioner({**b, "mask": mask}).spatial for b in (one, other))
    assert torch.equal(found, same)
    assert torch.equal(found[:, 3, :, :2], torch.ones(3, 4, 2)) and (found[:, 3, :, 2:] == -1).all()
    assert found[:, :3, :, :2].abs().max() == 0  # grey, normalised
    whole = Halver.norm.normalize(Halver().encode(one["image"] / 255).mean)
    torch.testing.assert_close(found[:, :3, :, 2:], whole[..., 2:])


def test_masks_are_a_function_of_the_serial_number():
    conditioner = InpaintingConditioner(Halver())
    whole = conditioner.mask_of(batch())
    alone = {key: value[1:2] if not isinstance(value, list) else value[1:2] for key, value in batch().items()}
    assert torch.equal(conditioner.mask_of(alone), whole[1:2])
    assert set(whole.unique().tolist()) == {0.0, 1.0}
    share = random_boxes(SampleRandom(0, range(500)), 32, 32).mean()
    assert 0.1 < share < 0.3


def test_tokens_of_a_layout():
    conditioner = MAKE["layout"]()
    tokens = conditioner.tokens(torch.tensor([[[1, 0.1, 0.2, 0.5, 0.6], [-1, -1, -1, -1, -1]]]))
    # Class 1 is token 2; cells of an 8 x 8 raster begin at 5: (row 1, column 0), (row 4, column 4).
    assert tokens.tolist() == [[2, 5 + 8, 5 + 4 * 8 + 4, 0, 0, 0, 0, 0, 0]]


def test_hybrid_joins_texts_over_tokens_and_maps_over_channels():
    from functools import partial

    facts = {"num_classes": 10, "text_encoders": TEXTS, "autoencoder": Halver()}
    parts = {
        "text": partial(TextConditioner, drop=0.5),
        "token": partial(LabelTokenConditioner, dim=6),
        "mask": InpaintingConditioner,
        "small": LowResolutionConditioner,
    }
    conditioner = derived(partial(HybridConditioner, parts=parts), latent_shape=(3, 4, 4), **facts)
    assert conditioner.context_dim == 6 and conditioner.concat_channels == 4 + 3
    assert set(conditioner.reads) == {"caption", "label", "image"}
    cond = conditioner(batch())
    assert cond.text.data.shape == (3, 4 + 1, 6) and cond.spatial.shape == (3, 7, 4, 4)
    null = conditioner.null(3, torch.device("cpu"))
    assert null.text.data.shape == (3, 5, 6) and null.spatial is None
    assert conditioner.draw_drop(SampleRandom(0, range(3))).keys() == {"text", "label"}
    assert len(list(conditioner.parameters())) == 1
    with pytest.raises(UserError, match="contexts of one width"):
        HybridConditioner({"a": TextConditioner, "b": partial(LabelTokenConditioner, dim=5)}, **facts)


@pytest.mark.parametrize(("name", "key"), [("superres", "image"), ("semantic", "segmentation"), ("layout", "boxes")])
def test_what_the_data_lack_is_named(name, key):
    conditioner = MAKE[name]()
    with pytest.raises(UserError, match="conditioner: "):
        conditioner({k: v for k, v in batch().items() if k != key})
