"""Checkpoints of diffusers' ``DiTTransformer2DModel`` to the house's ``DiT`` and back."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from repalign.checkpoints.fused import fuse, split
from repalign.checkpoints.keys import KeyMap, StateDict
from repalign.errors import UserError

KEYS = KeyMap(
    [
        ("pos_embed.proj.", "io.patchify."),
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.", "time_embed.mlp.0."),
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.", "time_embed.mlp.2."),
        ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.", "label_embed."),
        ("transformer_blocks.#.norm1.linear.", "blocks.#.modulation.linear."),
        ("transformer_blocks.#.attn1.to_out.0.", "blocks.#.attention.proj."),
        ("transformer_blocks.#.ff.net.0.proj.", "blocks.#.mlp.fc1."),
        ("transformer_blocks.#.ff.net.2.", "blocks.#.mlp.fc2."),
        ("proj_out_1.", "final_modulation.linear."),
        ("proj_out_2.", "io.linear."),
    ]
)
_QKV = {"blocks.#.attention.qkv.": [f"transformer_blocks.#.attn1.to_{part}." for part in "qkv"]}
_FUSED = re.compile(r"blocks\.\d+\.attention\.qkv\.")
_EMBEDDERS = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")
POSITIONS = "pos_embed"


class DiTDiffusersAdapter:
    """Every block there holds a copy of the embedders of time and label; positions are made, not stored.

    Deviation of diffusers from the official code: its sinusoid of the time has the frequencies 10000^(-k/127) instead
    of 10000^(-k/128), so the same weights predict slightly otherwise there, unless the network here has a max_period of
    10000^(128/127).

    Args:
        positions: the table [1, N, D] that an imported network gets.
    """

    containers = ()

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: {"backbone": state dict of ``repalign.backbones.dit.DiT``}.

        Raises:
            UserError: when the copies of the embedders differ.
        """
        joined = fuse(official, _QKV)
        once: dict[str, Tensor] = {}
        for key, value in joined.items():
            match = _EMBEDDERS.match(key)
            if match is None or match[1] == "0":
                once[key] = value
            elif not torch.equal(value, joined[f"transformer_blocks.0.norm1.emb.{match[2]}"]):
                raise UserError(f"checkpoint: '{key}' differs from that of block 0; DiT has one for all blocks")
        fused = {key: value for key, value in once.items() if _FUSED.match(key)}
        house = KEYS.to_house({key: value for key, value in once.items() if key not in fused})
        return {"backbone": {**house, **fused, POSITIONS: self.positions}}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The state dict of diffusers."""
        house = {key: value for key, value in parts["backbone"].items() if key != POSITIONS}
        fused = {key: value for key, value in house.items() if _FUSED.match(key)}
        out = KEYS.to_official({key: value for key, value in house.items() if key not in fused}) | split(fused, _QKV)
        depth = 1 + max(int(key.split(".")[1]) for key in fused)
        for key in [key for key in out if _EMBEDDERS.match(key)]:
            for number in range(1, depth):
                out[key.replace("blocks.0.", f"blocks.{number}.", 1)] = out[key].clone()
        return out
