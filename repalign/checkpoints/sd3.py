"""Checkpoints of Stable Diffusion 3 and 3.5, and of REPA's text-to-image network, to the house's ``MMDiT`` and back.

Two layouts hold the same weights: Stability's own and that of diffusers. The position table is read from the file.
"""

from __future__ import annotations

import re

from torch import Tensor

from repalign.checkpoints.fused import fuse, split, swap_halves
from repalign.checkpoints.keys import KeyMap, StateDict

PREFIX = "model.diffusion_model."  # of the network in single files that also hold autoencoder and text encoders

KEYS = KeyMap(
    [
        ("pos_embed", "pos_embed"),
        ("x_embedder.proj.", "patchify."),
        ("t_embedder.mlp.", "time_embed.mlp."),
        ("y_embedder.mlp.", "pooled_embed.mlp."),
        ("context_embedder.", "text_embed."),
        *(
            pair
            for theirs, ours in (("x_block", "image"), ("context_block", "text"))
            for pair in (
                (f"joint_blocks.#.{theirs}.adaLN_modulation.1.", f"blocks.#.{ours}.modulation.linear."),
                (f"joint_blocks.#.{theirs}.attn.ln_q.", f"blocks.#.{ours}.attention.q_norm."),
                (f"joint_blocks.#.{theirs}.attn.ln_k.", f"blocks.#.{ours}.attention.k_norm."),
                (f"joint_blocks.#.{theirs}.attn.", f"blocks.#.{ours}.attention."),
                (f"joint_blocks.#.{theirs}.attn2.ln_q.", f"blocks.#.{ours}.attention2.q_norm."),
                (f"joint_blocks.#.{theirs}.attn2.ln_k.", f"blocks.#.{ours}.attention2.k_norm."),
                (f"joint_blocks.#.{theirs}.attn2.", f"blocks.#.{ours}.attention2."),
                (f"joint_blocks.#.{theirs}.mlp.", f"blocks.#.{ours}.mlp."),
            )
        ),
        ("final_layer.adaLN_modulation.1.", "final_modulation.linear."),
        ("final_layer.linear.", "linear."),
    ]
)

DIFFUSERS = KeyMap(
    [
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj.", "patchify."),
        ("time_text_embed.timestep_embedder.linear_1.", "time_embed.mlp.0."),
        ("time_text_embed.timestep_embedder.linear_2.", "time_embed.mlp.2."),
        ("time_text_embed.text_embedder.linear_1.", "pooled_embed.mlp.0."),
        ("time_text_embed.text_embedder.linear_2.", "pooled_embed.mlp.2."),
        ("context_embedder.", "text_embed."),
        ("transformer_blocks.#.norm1.linear.", "blocks.#.image.modulation.linear."),
        ("transformer_blocks.#.norm1_context.linear.", "blocks.#.text.modulation.linear."),
        ("transformer_blocks.#.attn.norm_q.", "blocks.#.image.attention.q_norm."),
        ("transformer_blocks.#.attn.norm_k.", "blocks.#.image.attention.k_norm."),
        ("transformer_blocks.#.attn.norm_added_q.", "blocks.#.text.attention.q_norm."),
        ("transformer_blocks.#.attn.norm_added_k.", "blocks.#.text.attention.k_norm."),
        ("transformer_blocks.#.attn.to_out.0.", "blocks.#.image.attention.proj."),
        ("transformer_blocks.#.attn.to_add_out.", "blocks.#.text.attention.proj."),
        ("transformer_blocks.#.attn2.norm_q.", "blocks.#.image.attention2.q_norm."),
        ("transformer_blocks.#.attn2.norm_k.", "blocks.#.image.attention2.k_norm."),
        ("transformer_blocks.#.attn2.to_out.0.", "blocks.#.image.attention2.proj."),
        ("transformer_blocks.#.ff.net.0.proj.", "blocks.#.image.mlp.fc1."),
        ("transformer_blocks.#.ff.net.2.", "blocks.#.image.mlp.fc2."),
        ("transformer_blocks.#.ff_context.net.0.proj.", "blocks.#.text.mlp.fc1."),
        ("transformer_blocks.#.ff_context.net.2.", "blocks.#.text.mlp.fc2."),
        ("norm_out.linear.", "final_modulation.linear."),
        ("proj_out.", "linear."),
    ]
)
# In the house's keys on the left, so that the rest of the renaming sees them no more.
_QKV = {
    "blocks.#.image.attention.qkv.": [f"transformer_blocks.#.attn.to_{part}." for part in "qkv"],
    "blocks.#.text.attention.qkv.": [f"transformer_blocks.#.attn.add_{part}_proj." for part in "qkv"],
    "blocks.#.image.attention2.qkv.": [f"transformer_blocks.#.attn2.to_{part}." for part in "qkv"],
}
_FUSED = re.compile(r"blocks\.\d+\.\w+\.attention2?\.qkv\.")


class SD3Adapter:
    """Keys of Stability-AI/sd3.5 and sd3-ref; a single file's other networks are left aside.

    Args:
        prefix: written before every key: :data:`PREFIX` for a file that the official code loads.
    """

    containers = ()

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: {"backbone": state dict of ``repalign.backbones.mmdit.MMDiT``}."""
        if any(key.startswith(PREFIX) for key in official):
            official = {key.removeprefix(PREFIX): x for key, x in official.items() if key.startswith(PREFIX)}
        return {"backbone": KEYS.to_house(official)}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict of the network; heads of aligners stay behind."""
        return {self.prefix + key: value for key, value in KEYS.to_official(parts["backbone"]).items()}


class SD3DiffusersAdapter:
    """Keys of diffusers' ``SD3Transformer2DModel``.

    It keeps queries, keys and values apart, and writes scale before shift in the last norm and in the text half of the
    last block, where the official file has shift before scale.
    """

    containers = ()

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: {"backbone": state dict of ``repalign.backbones.mmdit.MMDiT``}."""
        joined = fuse(official, _QKV)
        fused = {key: value for key, value in joined.items() if _FUSED.match(key)}
        house = DIFFUSERS.to_house({key: value for key, value in joined.items() if key not in fused}) | fused
        return {"backbone": _swapped(house)}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The state dict of diffusers; heads of aligners stay behind."""
        house = _swapped(parts["backbone"])
        fused = {key: value for key, value in house.items() if _FUSED.match(key)}
        rest = DIFFUSERS.to_official({key: value for key, value in house.items() if key not in fused})
        return rest | split(fused, _QKV)


def _swapped(house: StateDict) -> dict[str, Tensor]:
    """The layers whose halves the two layouts order differently, exchanged."""
    last = max(int(key.split(".")[1]) for key in house if key.startswith("blocks."))
    turned = ("final_modulation.linear.", f"blocks.{last}.text.modulation.linear.")
    return {key: swap_halves(value) if key.startswith(turned) else value for key, value in house.items()}
