import pytest
import torch

from repalign.backbones.patchwise import Patchwise
from repalign.errors import UserError
from repalign.nn.patches import Crops
from repalign.state import Cond, Output, Tokens


class Pointwise(torch.nn.Module):
    """Looks at each place alone, so that crops change nothing."""

    tap_specs, uses_carry = {}, False

    def forward(self, x_t, t, cond, *, taps=(), only_taps=False, carry=None):
        return Output(x_t * t[:, None, None, None] + cond.spatial + cond.text.data.mean((1, 2))[:, None, None, None])


def test_cutting_and_joining_is_the_identity():
    x = torch.randn(2, 3, 12, 16)
    for crops in (Crops(8, 4), Crops(8, 4, tie_clip=(0.01, 0.5)), Crops(4, 4)):
        torch.testing.assert_close(crops.join(crops.cut(x), 12, 16), x)
    with pytest.raises(ValueError, match="do not cover a side of 12"):
        Crops(8, 3).cut(x)


def test_patchwise_prediction_of_a_pointwise_network_is_its_own():
    x, spatial = torch.randn(2, 3, 12, 16), torch.randn(2, 3, 12, 16)
    t, cond = torch.rand(2), Cond(text=Tokens(torch.randn(2, 5, 4)), spatial=spatial)
    network = Pointwise()
    whole = network(x, t, cond).pred
    torch.testing.assert_close(Patchwise(network, Crops(8, 4))(x, t, cond).pred, whole)
    with pytest.raises(UserError, match="no taps"):
        Patchwise(network, Crops(8, 4))(x, t, cond, taps=("mid",))
