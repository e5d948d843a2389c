"""Checkpoints of PixArt-alpha to the house's ``CrossDiT`` with adaLN-single, and back.

Both layouts hold the same weights: the official one and that of diffusers (``PixArtTransformer2DModel``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from repalign.checkpoints.fused import Groups, fuse, split
from repalign.checkpoints.keys import KeyMap, StateDict

OFFICIAL = KeyMap(
    [
        ("x_embedder.proj.", "patchify."),
        ("t_embedder.mlp.", "modulation.time_embed.mlp."),
        ("csize_embedder.mlp.", "modulation.size_embed.resolution.mlp."),
        ("ar_embedder.mlp.", "modulation.size_embed.aspect.mlp."),
        ("t_block.1.", "modulation.linear."),
        ("y_embedder.y_proj.", "text_embed."),
        ("blocks.#.attn.", "blocks.#.attention."),
        ("blocks.#.cross_attn.q_linear.", "blocks.#.cross_attention.q."),
        ("blocks.#.cross_attn.kv_linear.", "blocks.#.cross_attention.kv."),
        ("blocks.#.cross_attn.proj.", "blocks.#.cross_attention.proj."),
        ("blocks.#.mlp.", "blocks.#.mlp."),
        ("final_layer.linear.", "linear."),
        ("final_layer.scale_shift_table", "modulation.final_table"),
    ]
)
_TIME = "adaln_single.emb.{}_embedder.linear_"
DIFFUSERS = KeyMap(
    [
        ("pos_embed.proj.", "patchify."),
        *(
            (f"{_TIME.format(theirs)}{number}.", f"modulation.{ours}.mlp.{place}.")
            for theirs, ours in (
                ("timestep", "time_embed"),
                ("resolution", "size_embed.resolution"),
                ("aspect_ratio", "size_embed.aspect"),
            )
            for number, place in ((1, 0), (2, 2))
        ),
        ("adaln_single.linear.", "modulation.linear."),
        ("caption_projection.linear_1.", "text_embed.fc1."),
        ("caption_projection.linear_2.", "text_embed.fc2."),
        ("transformer_blocks.#.attn1.to_out.0.", "blocks.#.attention.proj."),
        ("transformer_blocks.#.attn2.to_q.", "blocks.#.cross_attention.q."),
        ("transformer_blocks.#.attn2.to_out.0.", "blocks.#.cross_attention.proj."),
        ("transformer_blocks.#.ff.net.0.proj.", "blocks.#.mlp.fc1."),
        ("transformer_blocks.#.ff.net.2.", "blocks.#.mlp.fc2."),
        ("scale_shift_table", "modulation.final_table"),
        ("proj_out.", "linear."),
    ]
)
_FUSED: Groups = {
    "blocks.#.attention.qkv.": [f"transformer_blocks.#.attn1.to_{part}." for part in "qkv"],
    "blocks.#.cross_attention.kv.": [f"transformer_blocks.#.attn2.to_{part}." for part in "kv"],
}
_FUSED_KEY = re.compile(r"blocks\.\d+\.(attention\.qkv|cross_attention\.kv)\.")
TABLES = "modulation.tables"
# Read by nobody here: the learned null caption (the empty prompt stands in for it) and the fixed positions.
_LEFT_ASIDE = ("y_embedder.y_embedding", "pos_embed")


class PixArtAdapter:
    """Keys of PixArt-alpha/PixArt-alpha. The learned null caption stays behind: the null is the empty prompt here."""

    containers = ("state_dict",)

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: {"backbone": state dict of ``repalign.backbones.cross_dit.CrossDiT``}."""
        rest, tables = _without_tables({k: v for k, v in official.items() if k not in _LEFT_ASIDE}, "blocks")
        return {"backbone": {**OFFICIAL.to_house(rest), TABLES: tables}}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict, without a null caption."""
        house = {key: value for key, value in parts["backbone"].items() if key != TABLES}
        return OFFICIAL.to_official(house) | _tables_of(parts["backbone"], "blocks")


class PixArtDiffusersAdapter:
    """Keys of diffusers' ``PixArtTransformer2DModel``, which keeps queries, keys and values apart."""

    containers = ()

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: {"backbone": state dict of ``repalign.backbones.cross_dit.CrossDiT``}."""
        rest, tables = _without_tables(fuse(official, _FUSED), "transformer_blocks")
        fused = {key: value for key, value in rest.items() if _FUSED_KEY.match(key)}
        house = DIFFUSERS.to_house({key: value for key, value in rest.items() if key not in fused})
        return {"backbone": {**house, **fused, TABLES: tables}}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The state dict of diffusers; heads of aligners stay behind."""
        house = {key: value for key, value in parts["backbone"].items() if key != TABLES}
        fused = {key: value for key, value in house.items() if _FUSED_KEY.match(key)}
        rest = DIFFUSERS.to_official({key: value for key, value in house.items() if key not in fused})
        return rest | split(fused, _FUSED) | _tables_of(parts["backbone"], "transformer_blocks")


def _without_tables(official: StateDict, blocks: str) -> tuple[dict[str, Tensor], Tensor]:
    """The state dict without the blocks' offsets, and these on top of each other."""
    pattern = re.compile(rf"{blocks}\.(\d+)\.scale_shift_table$")
    found: dict[int, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in official.items():
        if match := pattern.match(key):
            found[int(match[1])] = value
        else:
            rest[key] = value
    return rest, torch.stack([found[number] for number in sorted(found)])


def _tables_of(house: Mapping[str, Tensor], blocks: str) -> dict[str, Tensor]:
    return {f"{blocks}.{number}.scale_shift_table": table for number, table in enumerate(house[TABLES])}
