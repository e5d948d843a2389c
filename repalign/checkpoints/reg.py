"""Official REG checkpoints to the house's ``DiT`` with ``PatchAndClassIO`` and aligner heads, and back."""

from __future__ import annotations

from collections.abc import Sequence

from repalign.checkpoints.dit import keys_of
from repalign.checkpoints.keys import KeyMap
from repalign.checkpoints.repa import REPAAdapter

# ``final_layer.linear.`` ends on a dot, so that it does not begin ``final_layer.linear_cls.``
KEYS = KeyMap(
    [
        ("cls_projectors2.", "io.vector_in."),
        ("wg_norm.", "io.vector_norm."),
        ("final_layer.linear_cls.", "io.vector_out."),
        *keys_of("io.patches").pairs,
    ]
)


def reg_adapter(aligners: Sequence[str] = ("repa",)) -> REPAAdapter:
    """Keys of Martinser/REG: REPA's, and three layers of the class token. ``pos_embed`` has its zero row in front."""
    return REPAAdapter(aligners, keys=KEYS)
