"""Operations of whatever runs, without changing what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountOperations(TorchDispatchMode):
    """Floating-point operations of matrix products, convolutions and attention, by PyTorch's formulas.

    ``FlopCounterMode`` takes composite operations apart before it counts, so the last bits of a training step under it
    are others than without it. Here every operation runs as it would: a step that is counted is bit-identical to one
    that is not. The counts are the same. A compiled network runs uncompiled meanwhile.

    Attributes:
        total: operations so far; a multiplication with its addition is two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count it where there is a formula."""
        given = kwargs or {}
        out = func(*args, **given)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **given, out_val=out)
        return out
