"""Detections without a detector, and small networks of transformers in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from repalign.encoders.detection import Detections

WORDS = "<pad> <start> <end> <unk> yes no a photo of red blue book vase and object colored ?".split()


def seen(*objects: tuple[str, float, Sequence[float]]) -> Detections:
    """Label, score and box of each object."""
    boxes = torch.tensor([list(box) for _, _, box in objects]).reshape(-1, 4)
    return Detections(boxes, [name for name, _, _ in objects], torch.tensor([score for _, score, _ in objects]))


class Finds:
    """A detector that finds the same objects in every picture."""

    labels = ("book", "vase", "mouse")
    fingerprint = "finds"

    def __init__(self, found: Detections):
        self.found = found

    def __call__(self, pictures):
        return [self.found] * len(pictures)

    def to(self, device):
        return self


class Hears:
    """A text is red, blue or neither; a picture is as red and as blue as its mean."""

    fingerprint = "hears"

    def __call__(self, images):
        return (images.mean((2, 3))[:, [0, 2]],)

    def texts(self, captions):
        return torch.tensor([["red" in text, "blue" in text] for text in captions]).float() + 1e-3

    def to(self, device):
        return self


class Answers:
    """Says yes by the number of words of the question."""

    fingerprint = "answers"

    def __init__(self):
        self.asked = []

    def __call__(self, pictures, questions):
        self.asked += questions
        return torch.tensor([1 / len(question.split()) for question in questions])

    def to(self, device):
        return self


def write_tokenizer(folder: Path) -> None:
    """One token per word."""
    inner = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", bos_token="<start>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP with both towers of width 16, projected to 12, for pictures of 8 px."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = {**sizes, **ids, "vocab_size": len(WORDS), "max_position_embeddings": 9}
    network = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=12)
    )
    with torch.no_grad():  # the small initial weights would hide differences
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_boxes(folder: Path) -> Path:
    """A YOLOS that names books and vases, for pictures of 32 px."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        id2label={0: "book", 1: "vase"},
        label2id={"book": 0, "vase": 1},
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_masks(folder: Path) -> Path:
    """A Mask2Former of width 32 that names books and vases."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        image_size=32,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        id2label={0: "book", 1: "vase"},
        label2id={"book": 0, "vase": 1},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 32, "width": 32}, size_divisor=32).save_pretrained(folder)
    return folder


def write_blip(folder: Path) -> Path:
    """A BLIP for questions of width 16, for pictures of 16 px."""
    from transformers import BlipConfig, BlipForQuestionAnswering

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "max_position_embeddings": 40}
    text |= {"bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0}
    network = BlipForQuestionAnswering(
        BlipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
