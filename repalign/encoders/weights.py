"""Weights of frozen vision transformers: where they are, how each family names them, whether they fit."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import eva, load_state_dict_from_hf, vision_transformer
from torch import Tensor, nn

from repalign.encoders.cards import Card
from repalign.errors import UserError, nearest
from repalign.reading import read_torch

KEY = "encoders.main.weights"
HUB, RANDOM = "hub", "random"
CHOICES = "give 'hub', the path of a weight file, or 'random' for an untrained network"
_log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
# Parts of official files that no patch token passes through.
_UNUSED = ("head.", "fc.", "fc_norm.", "attn_pool.", "mask_token")


def find_weights(card: Card, weights: str | Path) -> tuple[dict[str, Any], str] | None:
    """What the weight file of an encoder holds.

    Args:
        card: of the encoder.
        weights: ``hub`` (downloaded once, then from the cache), ``random`` (nothing is read, and the log says so), or
            the path of an official or timm file: .safetensors, or .pth, .pt, .bin, .tar read without running its code.

    Returns:
        The file's content and where it comes from; None for ``random``.

    Raises:
        UserError: naming ``encoders.main.weights``, what was found and what was expected.
    """
    if weights == RANDOM:
        _log.warning("%s: %s has random weights; its features mean nothing", KEY, card.name)
        return None
    return _download(card) if weights == HUB else (_read(Path(weights), card), str(weights))


def fill(network: nn.Module, card: Card, held: Mapping[str, Any], origin: str) -> None:
    """Fill a network with what a weight file of its family holds.

    Position tables of another grid are resampled (bicubic, antialiased, prefix tokens kept), as REPA does; every other
    tensor must be there and have its shape.

    Args:
        network: a timm vision transformer, built with the card's architecture.
        card: of the encoder.
        held: the file's content: bare tensors, or wrapped as the family wraps them.
        origin: where it comes from, for messages.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape.
    """
    unwrap, convert = FAMILIES[card.family]
    try:
        unwrapped = unwrap(dict(held))
        _check_patches(network, unwrapped, card, origin)
        converted = convert(unwrapped, network)
        kept = {
            name: value
            for name, value in converted.items()
            if not name.startswith(_UNUSED) and (card.final_norm or not name.startswith("norm."))
        }
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError) as error:  # nested in another way
        raise UserError(f"{KEY}: '{origin}' is no file of {card.name} ({card.family}): {error}") from error
    _load_exactly(network, kept, card, origin)


def _download(card: Card) -> tuple[dict[str, Any], str]:
    """The tensors of the card's public copy."""
    place = card.hub or card.url
    if place is None:
        raise UserError(f"{KEY}: {card.name} is on no hub; give the path of its file (source: {card.source})")
    try:
        if card.hub:
            return dict(load_state_dict_from_hf(card.hub)), place
        return torch.hub.load_state_dict_from_url(place, map_location="cpu", weights_only=True), place
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{KEY}: 'hub' found no {card.name} at {place} ({_first_line(error)}); connect to the network once, or "
            f"give the path of the file{f' from {card.source}' if card.source else ''}"
        ) from error


def _read(file: Path, card: Card) -> dict[str, Any]:
    """What a weight file holds."""
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(
            f"{KEY}: no file '{file}' for {card.name}.{nearest(file.name, [HUB, RANDOM, *beside])} Expected: {CHOICES}."
        )
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        held = read_torch(file)
    except (SafetensorError, OSError, RuntimeError) as error:
        # A TorchScript archive (OpenAI's CLIP download) ends here too: it is a program, not tensors.
        raise UserError(
            f"{KEY}: '{file}' holds more than tensors, or is broken ({_first_line(error)}); give 'hub', or the "
            "network's state dict saved as .safetensors"
        ) from error
    if not isinstance(held, Mapping):
        raise UserError(f"{KEY}: '{file}' holds a {type(held).__name__}, expected a state dict of {card.name}")
    return dict(held)


def _check_patches(network: nn.Module, tensors: StateDict, card: Card, origin: str) -> None:
    """The patch embedding, before timm would resample it to another patch size without a word."""
    own = network.get_parameter("patch_embed.proj.weight")
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{KEY}: '{origin}' is no file of {card.name} ({card.family}): it holds '{name}' of type "
                f"{type(value).__name__}, expected tensors alone"
            )
        if value.ndim == own.ndim and value.shape != own.shape:
            raise UserError(_mismatch(card, origin, name, value, own))


def _load_exactly(network: nn.Module, tensors: StateDict, card: Card, origin: str) -> None:
    own = network.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        expected, found = own.get(name), tensors.get(name)
        if expected is None or found is None or expected.shape != found.shape:
            raise UserError(_mismatch(card, origin, name, found, expected))
    network.load_state_dict(tensors)


def _mismatch(card: Card, origin: str, name: str, found: Tensor | None, expected: Tensor | None) -> str:
    def size(tensor: Tensor | None) -> str:
        return "absent" if tensor is None else "x".join(map(str, tensor.shape)) or "scalar"

    return (
        f"{KEY}: '{origin}' holds no {card.name} ({card.family}): '{name}' is {size(found)} in the file, "
        f"{size(expected)} in the encoder"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(held: dict[str, Any]) -> StateDict:
    return held


def _mae(held: dict[str, Any]) -> StateDict:
    return {k: v for k, v in held.get("model", held).items() if not k.startswith(("decoder_", "mask_token"))}


def _jepa(held: dict[str, Any]) -> StateDict:
    return {k.removeprefix("module."): v for k, v in held.get("encoder", held).items()}


def _mocov3(held: dict[str, Any]) -> StateDict:
    tensors, prefix = held.get("state_dict", held), "module.base_encoder."
    if any(k.startswith(prefix) for k in tensors):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return {_mend(k): v for k, v in tensors.items()}


# The ViT-L file that REPA uses has four names in two blocks that a search and replace spoilt.
_SPOILT = {
    r"^blocks\.13\.norm13\.": "blocks.13.norm1.",
    r"^blocks\.13\.mlp\.fc13\.": "blocks.13.mlp.fc1.",
    r"^blocks\.14\.norm14\.": "blocks.14.norm2.",
    r"^blocks\.14\.mlp\.fc14\.": "blocks.14.mlp.fc2.",
}


def _mend(name: str) -> str:
    for spoilt, right in _SPOILT.items():
        name = re.sub(spoilt, right, name)
    return name


def _clip(held: dict[str, Any]) -> StateDict:
    """The image tower alone, of a whole CLIP or bare; timm's names pass."""
    if "class_embedding" in held:
        return {f"visual.{k}": v for k, v in held.items()}
    if "visual.class_embedding" in held:
        return {k: v for k, v in held.items() if k.startswith("visual.")}
    return held


def _dinov3(held: dict[str, Any]) -> StateDict:
    """Official files carry masked or zero biases of queries, keys and values, which the architecture leaves out."""
    biases = {k: v for k, v in held.items() if k.endswith(".attn.qkv.bias")}
    for name, bias in biases.items():
        query, _, value = bias.chunk(3)  # the key's bias is masked: it cancels in the softmax
        if query.any() or value.any():
            raise UserError(f"{KEY}: '{name}' is not zero; this DINOv3 needs the card of another architecture")
    return {k: v for k, v in held.items() if k not in biases}


Unwrap = Callable[[dict[str, Any]], StateDict]
Convert = Callable[[StateDict, Any], StateDict]
# How a file of each family becomes bare tensors, and timm's own conversion of those to its names and grid.
FAMILIES: Mapping[str, tuple[Unwrap, Convert]] = {
    "dinov1": (_plain, vision_transformer.checkpoint_filter_fn),
    "dinov2": (_plain, vision_transformer.checkpoint_filter_fn),
    "dinov3": (_dinov3, eva.checkpoint_filter_fn),
    "mae": (_mae, vision_transformer.checkpoint_filter_fn),
    "mocov3": (_mocov3, vision_transformer.checkpoint_filter_fn),
    "jepa": (_jepa, vision_transformer.checkpoint_filter_fn),
    "clip": (_clip, vision_transformer.checkpoint_filter_fn),
    "siglip": (_plain, vision_transformer.checkpoint_filter_fn),
}
