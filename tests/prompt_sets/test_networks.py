"""CLIP, detectors and BLIP of transformers from local folders, on small random weights."""

from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F

from repalign.encoders.clip import ClipImageText, middle
from repalign.encoders.detection import BoxDetector, InstanceDetector
from repalign.encoders.scorer_folders import WANTED
from repalign.encoders.vqa import BlipVQA
from repalign.errors import UserError
from tests.prompt_sets.made_up import WORDS, write_blip, write_boxes, write_clip, write_masks

PICTURES = torch.randint(0, 256, (2, 3, 24, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_clip_is_that_of_transformers(tmp_path):
    clip = ClipImageText(write_clip(tmp_path))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    (seen,) = clip(images)
    texts = clip.texts(["a red book", "a blue vase and a book of red photo a red book a red"])
    tokens = clip.tokenizer(["a red book"], padding="max_length", max_length=9, return_tensors="pt")
    with torch.no_grad():
        whole = clip.network(pixel_values=(images - clip.mean) / clip.std, **tokens)
    torch.testing.assert_close(F.normalize(seen, dim=-1), whole.image_embeds)
    torch.testing.assert_close(F.normalize(texts[:1], dim=-1), whole.text_embeds)
    assert clip.fingerprint != ClipImageText(write_clip(tmp_path / "other", seed=1)).fingerprint


def test_pictures_are_cut_to_the_middle():
    images = torch.zeros(1, 3, 8, 16)
    images[..., 4:12] = 1
    assert torch.equal(middle(images, 8), torch.ones(1, 3, 8, 8))
    assert middle(torch.rand(1, 3, 40, 17), 8).shape == (1, 3, 8, 8)


def test_boxes(tmp_path):
    detector = BoxDetector(write_boxes(tmp_path))
    assert detector.labels == ["book", "vase"]
    one, other = detector(PICTURES)
    for found in (one, other):
        assert found.boxes.shape == (len(found.labels), 4) and found.masks is None
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True) and len(found.labels) > 0
        assert found.boxes[:, 0::2].max() <= 32 * 1.5 and set(found.labels) <= {"book", "vase"}
    (alone,) = detector(PICTURES[:1])
    torch.testing.assert_close(alone.boxes, one.boxes)


def test_masks(tmp_path):
    detector = InstanceDetector(write_masks(tmp_path), most=6)
    for found in detector(PICTURES):
        assert found.masks is not None and found.masks.shape == (len(found.labels), 24, 32)
        assert 0 < len(found.labels) <= 6 and set(found.labels) <= {"book", "vase"}
        for box, mask in zip(found.boxes.int().tolist(), found.masks, strict=True):
            inside = torch.zeros_like(mask)
            inside[box[1] : box[3], box[0] : box[2]] = True
            assert not (mask & ~inside).any() and mask[box[1]].any() and mask[:, box[0]].any()


def test_answers_are_the_decoders_first_token(tmp_path):
    vqa = BlipVQA(write_blip(tmp_path))
    chances = vqa(PICTURES, ["a red book?", "a blue vase and a red book?"])
    assert ((chances > 0) & (chances < 1)).all() and chances[0] != chances[1]
    (alone,) = vqa(PICTURES[:1], ["a red book?"])  # padding has no say
    torch.testing.assert_close(alone, chances[0])
    images = (
        F.interpolate(PICTURES.float() / 255, (16, 16), mode="bicubic", antialias=True).clamp(0, 1) - vqa.mean
    ) / vqa.std
    asked = vqa.tokenizer(["a red book?"], return_tensors="pt")
    with torch.no_grad():
        drawn = vqa.network.generate(
            pixel_values=images[:1],
            **asked,
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
            do_sample=False,
        )
    yes, no = drawn.scores[0][0][[WORDS.index("yes"), WORDS.index("no")]].softmax(0).tolist()
    assert alone.item() == pytest.approx(yes, rel=1e-4) and no == pytest.approx(1 - yes, rel=1e-3)


@pytest.mark.parametrize("network", [ClipImageText, BoxDetector, InstanceDetector, BlipVQA])
def test_missing_weights_are_one_line(tmp_path, network, caplog):
    wanted = WANTED[f"{network.__module__}.{network.__name__}"]
    for folder, message in (
        (None, "no weights named; expected a folder with config.json"),
        (tmp_path / "none", f"no folder '{tmp_path}/none'; expected a folder"),
        (tmp_path, f"no config.json in '{tmp_path}'; expected"),
    ):
        with pytest.raises(UserError, match=f"^k: {message}") as error:
            network(folder, key="k")
        assert "\n" not in str(error.value) and f"'hf download {wanted.example} --local-dir" in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        UserError, match=r"^k: no model.safetensors in '.*' \(pytorch_model.bin can hold code and is not"
    ):
        network(tmp_path, key="k")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="^k: no (tokenizer|preprocessor)"):
        network(tmp_path, key="k")
    (tmp_path / wanted.beside.replace("*", "")).write_text("{}")
    with caplog.at_level(logging.CRITICAL), pytest.raises(UserError, match=r"^k: .* cannot be read \(") as error:
        network(tmp_path, key="k")
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(UserError, match="asks for code"):
        network(tmp_path, key="k")
