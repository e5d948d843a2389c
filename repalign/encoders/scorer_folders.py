"""Folders of the networks that judge pictures; apart from the networks, so that a check before heavy work may ask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from repalign.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Wanted:
    """What a folder of ``transformers`` must hold.

    Attributes:
        network: in words.
        beside: pattern of the file that prepares pictures or texts, beside config.json and the weights.
        example: a repository that holds all of it.
    """

    network: str
    beside: str
    example: str

    def __str__(self) -> str:
        """For messages, after 'expected'."""
        return (
            f"a folder with config.json, {self.beside} and model.safetensors of {self.network}, "
            f"as 'hf download {self.example} --local-dir FOLDER' brings it"
        )


CLIP = Wanted(
    "a CLIP (T2I-CompBench: openai/clip-vit-base-patch32)", "tokenizer*.json", "openai/clip-vit-large-patch14"
)
BOXES = Wanted("a detector with boxes", "preprocessor_config.json", "facebook/detr-resnet-50")
MASKS = Wanted(
    "a Mask2Former for instances", "preprocessor_config.json", "facebook/mask2former-swin-small-coco-instance"
)
BLIP = Wanted("a BLIP for questions", "tokenizer*.json", "Salesforce/blip-vqa-base")
# Of the classes that a configuration may name.
WANTED = {
    "repalign.encoders.clip.ClipImageText": CLIP,
    "repalign.encoders.detection.BoxDetector": BOXES,
    "repalign.encoders.detection.InstanceDetector": MASKS,
    "repalign.encoders.vqa.BlipVQA": BLIP,
}


def find_folder(folder: str | Path | None, key: str, wanted: Wanted) -> Path:
    """A folder that holds every file that is wanted; none of them is opened.

    Raises:
        UserError: naming the key, the folder and the first file that is missing.
    """
    if folder is None:
        raise UserError(f"{key}: no weights named; expected {wanted}")
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"{key}: no folder '{place}'; expected {wanted}")
    for names in (("config.json",), WEIGHTS, (wanted.beside,)):
        if not any(next(place.glob(name), None) for name in names):
            other = " (pytorch_model.bin can hold code and is not read)" if names is WEIGHTS else ""
            other = other if (place / "pytorch_model.bin").is_file() else ""
            raise UserError(f"{key}: no {names[0]} in '{place}'{other}; expected {wanted}")
    return place
