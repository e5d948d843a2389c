"""U-REPA checkpoints in the paper's names to the house's ``SiTDown`` and aligner head, and back.

No official checkpoint could be read: the layout follows the names of SiT and of the paper's stages.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from repalign.checkpoints.keys import KeyMap, StateDict

_STAGES = ("encoder", "middle", "decoder")
KEYS = KeyMap(
    [
        ("pos_embed", "pos_embed"),
        ("x_embedder.proj.", "io.patchify."),
        ("t_embedder.", "time_embed."),
        ("t_embedder_mid.", "time_embed_mid."),
        ("y_embedder.embedding_table.", "label_embed."),
        ("y_embedder_mid.embedding_table.", "label_embed_mid."),
        *((f"{stage}.#.adaLN_modulation.1.", f"{stage}.#.modulation.linear.") for stage in _STAGES),
        *((f"{stage}.#.attn.", f"{stage}.#.attention.") for stage in _STAGES),
        *((f"{stage}.#.mlp.", f"{stage}.#.mlp.") for stage in _STAGES),
        ("down.", "down."),
        ("up.", "up."),
        ("fuse.", "fuse."),
        ("final_layer.linear.", "io.linear."),
        ("final_layer.adaLN_modulation.1.", "final_modulation.linear."),
    ]
)
HEAD = "projectors.0."


class URepaAdapter:
    """SiT's names in three stages, plus ``projectors.0.{0,2,4}`` which is the head of the aligner.

    Args:
        aligners: the first is the one whose head it is; without aligners the head stays behind.
    """

    containers = ("model", "ema")

    def __init__(self, aligners: Sequence[str] = ("u_repa",)) -> None:
        self.heads = [f"aligners.{name}.head" for name in aligners[:1]]

    def from_official(self, official: StateDict) -> dict[str, dict[str, Tensor]]:
        """Parts by name: ``backbone`` and ``aligners.<name>.head`` where the file has one."""
        trunk = {key: value for key, value in official.items() if not key.startswith(HEAD)}
        head = {f"layers.{key.removeprefix(HEAD)}": v for key, v in official.items() if key.startswith(HEAD)}
        return {"backbone": KEYS.to_house(trunk), **({name: head for name in self.heads} if head else {})}

    def to_official(self, parts: dict[str, StateDict]) -> dict[str, Tensor]:
        """The official state dict: trunk and projector."""
        heads = [parts[name] for name in self.heads if name in parts]
        renamed = {HEAD + key.removeprefix("layers."): value for head in heads for key, value in head.items()}
        return KEYS.to_official(parts["backbone"]) | renamed
