"""What may be done with the low-rank additions of a network: switch off, tell apart, write, merge.

They are peft's layers, put there by :func:`repalign.backbones.tuning.lora`; nothing here imports peft: a network
without additions needs none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.protocols import Backbone

GIVEN = "given_weights"  # buffer of a network with additions: stands for the weights that they are made for
ADDITION = "lora_"  # in the names of the additions


def adapted_layers(network: Any) -> list[Any]:
    """The layers with additions."""
    return [part for part in network.modules() if hasattr(part, "base_layer") and hasattr(part, "enable_adapters")]


def adapted_networks(module: nn.Module) -> dict[str, nn.Module]:
    """Networks with additions inside a module, by their places in it."""
    return {name: part for name, part in module.named_modules() if GIVEN in dict(part.named_buffers(recurse=False))}


def given_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that stay as they were given: those of networks with additions, without the additions."""
    networks = adapted_networks(module).values()
    return [value for network in networks for name, value in network.named_parameters() if ADDITION not in name]


def given_names(module: nn.Module) -> list[str]:
    """Names, in the module's state, of everything that was given: parameters and fixed positions."""
    return [
        f"{place}.{name}" if place else name
        for place, network in adapted_networks(module).items()
        for name in network.state_dict()
        if ADDITION not in name and name != GIVEN
    ]


@contextmanager
def without_adapters(backbone: Backbone) -> Iterator[Backbone]:
    """The network as it was before tuning, inside a ``with``: its additions are switched off, then on again.

    Exactly the given network: an adapted layer calls the given one and nothing else. Takes no memory.

    Raises:
        UserError: when the network has no additions, so that there is nothing to go back to.
    """
    layers = adapted_layers(backbone)
    if not layers:
        raise UserError(
            "objective: needs a frozen reference, the network without its low-rank additions; set tuning=lora"
        )
    assert isinstance(backbone, nn.Module)
    asking = [weight for weight in backbone.parameters() if weight.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield backbone
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        backbone.requires_grad_(False)  # peft asks for gradients of all additions, those of an average too
        for weight in asking:
            weight.requires_grad_(True)


def mark_given(backbone: nn.Module) -> None:
    """Put a number on the network that stands for its weights, in an integer buffer; before there are additions.

    Of names, shapes and about a thousand entries of each tensor: so that additions are not loaded onto other weights.
    """
    digest = hashlib.blake2b(digest_size=7)
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if not value.is_meta:
            flat = value.detach().reshape(-1)
            digest.update(flat[:: max(1, flat.numel() // 1000)].float().cpu().numpy().tobytes())
    backbone.register_buffer(GIVEN, torch.tensor(int.from_bytes(digest.digest(), "little")))


def check_given(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The additions of a checkpoint belong to the weights of this composition.

    Raises:
        UserError: naming ``tuning.weights``.
    """
    for key, own in module.state_dict().items():
        if key.rpartition(".")[2] == GIVEN and key in state and not torch.equal(state[key].cpu(), own.cpu()):
            raise UserError(
                "tuning.weights: the checkpoint holds low-rank additions to other weights than these; give the file "
                "that they were trained on (tuning.weights in the run's config.yaml)"
            )


def merge(backbone: nn.Module) -> nn.Module:
    """Fold the additions into the layers, in place: W + alpha / rank B A, with the names of the plain network.

    Raises:
        UserError: when the network has no additions.
    """
    _configs(backbone)
    layers: list[tuple[str, Any]] = [*backbone.named_modules()]
    for name, layer in layers:
        if hasattr(layer, "base_layer") and hasattr(layer, "enable_adapters"):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, layer.get_base_layer())
    del backbone.peft_config
    delattr(backbone, GIVEN)
    return backbone


def save_adapter(backbone: nn.Module, folder: Path) -> None:
    """Write the additions alone, as peft keeps them: ``PeftModel.from_pretrained(backbone, folder)``.

    The network that they are put on again is the plain backbone with the weights that were given, not behind a clock.

    Raises:
        UserError: when the backbone has no additions.
    """
    [(name, config)] = _configs(backbone).items()
    additions = {
        f"base_model.model.{key.replace(f'.{name}.', '.')}": value.contiguous()
        for key, value in backbone.state_dict().items()
        if ADDITION in key
    }
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    partial = folder / ".adapter_model.safetensors.incomplete"
    save_file(additions, partial)
    os.replace(partial, folder / "adapter_model.safetensors")


def _configs(backbone: nn.Module) -> dict[str, Any]:
    configs: Any = getattr(backbone, "peft_config", None)
    if not configs:
        raise UserError("task.family: lora exports low-rank additions, this composition has none; set tuning=lora")
    return configs
