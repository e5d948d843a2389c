"""LDM's and diffusers' U-Net checkpoints to the house's ``UNet`` and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from repalign.backbones.unet import UNet
from repalign.checkpoints.keys import StateDict
from repalign.checkpoints.unet_keys import DIFFUSERS, LDM, layer_names
from repalign.errors import UserError

QKV = ("to_q", "to_k", "to_v")


class LDMUNetAdapter:
    """Keys of CompVis/latent-diffusion's ``UNetModel``; one part, the backbone.

    A whole training checkpoint is read too: the network is below ``model.diffusion_model.`` and its average below
    ``model_ema.``, where names have lost their dots; autoencoder, conditioning stage and schedule stay behind. LDM's
    1x1 convolutions are linear layers here, and the fused projection of an attention without context, which LDM sorts
    by head, is sorted by query, key and value.

    Args:
        network: whose structure the names follow.
        average: read the average where the file has one.
        prefix: of the keys that are written.
        by_head: how the file sorts fused projections; False for ``use_new_attention_order``.
        stage: names of the conditioner's weights, ours -> the file's; a part ``conditioner`` then goes along.
    """

    containers = ("state_dict",)

    def __init__(
        self,
        network: UNet,
        average: bool = False,
        prefix: str = "",
        by_head: bool = True,
        stage: Mapping[str, str] | None = None,
    ) -> None:
        self.stage = dict(stage or {})
        self.names = layer_names(network, LDM)
        self.heads = {
            layer: network.get_submodule(layer.rpartition(".")[0]).heads  # of the attention around the projection
            for layer in self.names
            if layer.endswith(".qkv")
        }
        self.average = average
        self.prefix = prefix
        self.by_head = by_head

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: ``backbone``, a state dict of ``repalign.backbones.unet.UNet``, and perhaps ``conditioner``.

        Raises:
            UserError: for a key that this architecture does not have, or a conditioner's that is missing.
        """
        house = _rename(self._network(official), {theirs: ours for ours, theirs in self.names.items()})
        parts = {"backbone": {key: self._to_house(key, value) for key, value in house.items()}}
        missing = [name for name in self.stage.values() if name not in official]
        if missing:
            raise UserError(f"checkpoint: no '{missing[0]}', which the conditioner needs; is this another model?")
        conditioner = {ours: official[theirs] for ours, theirs in self.stage.items()}
        return {**parts, "conditioner": conditioner} if conditioner else parts

    def to_official(self, parts: Mapping[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict of the backbone and of the conditioner; other parts stay behind."""
        house = {key: self._to_file(key, value) for key, value in parts["backbone"].items()}
        network = {self.prefix + key: value for key, value in _rename(house, self.names).items()}
        return network | {theirs: parts["conditioner"][ours] for ours, theirs in self.stage.items()}

    def _network(self, official: StateDict) -> StateDict:
        inside = "model.diffusion_model."
        keys = [key.removeprefix(inside) for key in official if key.startswith(inside)]
        if not keys:
            return official
        if self.average and "model_ema.decay" in official:
            averaged = {key: "model_ema." + f"diffusion_model.{key}".replace(".", "") for key in keys}
            return {key: official[name] for key, name in averaged.items()}
        return {key: official[inside + key] for key in keys}

    def _to_house(self, key: str, value: Tensor) -> Tensor:
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and _is_linear(layer):
            value = value.flatten(1)
        if layer in self.heads and self.by_head:
            value = rearrange(value, "(h three d) ... -> (three h d) ...", three=3, h=self.heads[layer])
        return value

    def _to_file(self, key: str, value: Tensor) -> Tensor:
        layer, _, kind = key.rpartition(".")
        if layer in self.heads and self.by_head:
            value = rearrange(value, "(three h d) ... -> (h three d) ...", three=3, h=self.heads[layer])
        if kind == "weight" and _is_linear(layer):
            value = value[..., None] if ".attention.attention." in layer else value[..., None, None]
        return value


class DiffusersUNetAdapter:
    """Keys of diffusers' ``UNet2DConditionModel`` and, without a context, ``UNet2DModel``; one part, the backbone.

    Args:
        network: whose structure the names follow.
    """

    containers = ()

    def __init__(self, network: UNet) -> None:
        self.names = layer_names(network, DIFFUSERS)

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: {"backbone": state dict of ``repalign.backbones.unet.UNet``}.

        Raises:
            UserError: for a key that this architecture does not have.
        """
        joined = dict(official)
        for key in official:
            layer, _, kind = key.rpartition(".")
            if layer.endswith(".to_q") and layer.removesuffix("to_q") + "to_qkv" in self.names.values():
                rows = [joined.pop(f"{layer.removesuffix('to_q')}{part}.{kind}") for part in QKV]
                joined[f"{layer.removesuffix('to_q')}to_qkv.{kind}"] = torch.cat(rows)
        house = _rename(joined, {theirs: ours for ours, theirs in self.names.items()})
        return {"backbone": {key: v.flatten(1) if _is_transformers(key) else v for key, v in house.items()}}

    def to_official(self, parts: Mapping[str, StateDict]) -> dict[str, Tensor]:
        """The state dict for diffusers; other parts stay behind."""
        house = {key: v[..., None, None] if _is_transformers(key) else v for key, v in parts["backbone"].items()}
        found: dict[str, Tensor] = {}
        for key, value in _rename(house, self.names).items():
            layer, _, kind = key.rpartition(".")
            if not layer.endswith(".to_qkv"):
                found[key] = value
                continue
            for part, rows in zip(QKV, value.chunk(3), strict=True):
                found[f"{layer.removesuffix('to_qkv')}{part}.{kind}"] = rows.contiguous()
        return found


def _is_transformers(key: str) -> bool:
    """Whether a key of ours is one of the two projections of a spatial transformer: 1x1 convolutions elsewhere."""
    return key.endswith((".attention.proj_in.weight", ".attention.proj_out.weight"))


def _is_linear(layer: str) -> bool:
    """Whether a layer of ours is a convolution of size 1 in LDM."""
    return _is_transformers(f"{layer}.weight") or layer.endswith(
        (".attention.attention.qkv", ".attention.attention.proj")
    )


def _rename(state: StateDict, names: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        layer, _, kind = key.rpartition(".")
        if layer not in names:
            raise UserError(f"checkpoint: key '{key}' is none of this U-Net's; is this another architecture?")
        found[f"{names[layer]}.{kind}"] = value
    return found
