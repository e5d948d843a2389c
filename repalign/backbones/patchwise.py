"""A backbone over the crops of a large state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from repalign.errors import UserError
from repalign.nn.patches import Crops
from repalign.protocols import Backbone
from repalign.state import Cond, Output, TokenSpec


class Patchwise(nn.Module):
    """A network that sees overlapping crops of its state one by one; predictions are blended (LDM's patch-wise mode).

    For states that are larger than what fits into memory or than what the network was trained on: all crops run as one
    batch, the map beside the state is cut alike, label and text are the same for every crop.

    Args:
        backbone: the network.
        crops: how crops are cut and blended.

    Raises:
        UserError: when hidden states are asked for, which belong to crops.
    """

    uses_carry = False
    tap_specs: Mapping[str, TokenSpec] = {}

    def __init__(self, backbone: Backbone, crops: Crops) -> None:
        super().__init__()
        self.backbone = backbone
        self.crops = crops

    @property
    def units(self) -> Sequence[nn.Module]:
        """Those of the wrapped backbone."""
        return getattr(self.backbone, "units", ())

    def forward(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        cond: Cond,
        *,
        taps: Collection[str] = (),
        only_taps: bool = False,
        carry: Any = None,
    ) -> Output:
        """Predict every crop and blend."""
        if taps or only_taps:
            raise UserError("backbone: patch-wise prediction has no taps; align the network without it")
        count = self.crops.cut(x_t).shape[-1]

        def many(values: Tensor) -> Tensor:
            return repeat(values, "b ... -> (b l) ...", l=count)

        def cut(values: Tensor) -> Tensor:
            return rearrange(self.crops.cut(values), "b c i j l -> (b l) c i j")

        spatial = None if cond.spatial is None else cut(cond.spatial)
        out = self.backbone(cut(x_t), many(t), Cond(spatial=spatial).completed(cond.map(many)))

        def join(values: Tensor) -> Tensor:
            return self.crops.join(rearrange(values, "(b l) c i j -> b c i j l", l=count), *x_t.shape[2:])

        assert isinstance(out.pred, Tensor), "a state of one stream has a prediction of one stream"
        return Output(join(out.pred), {name: join(head) for name, head in out.heads.items()})  # type: ignore[arg-type]
