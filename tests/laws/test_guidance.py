"""Classifier-free guidance: what is off at scale 1, what it costs, what its interval and channels mean."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance, NoGuidance, guide
from repalign.paths.parametrization import Noise, Velocity
from repalign.random import SampleRandom
from repalign.samplers.euler import Euler
from repalign.samplers.field import ANEW, DenoisingField
from repalign.samplers.heun import Heun
from repalign.samplers.refresh import Every, SharedCarry
from repalign.state import Cond, Streams
from tests.laws.exact import PATHS, GaussianNetwork

RANDOM = SampleRandom(3, range(3))
X_1 = RANDOM.normal("x_1", (4, 2, 2), torch.float64)
COND, NULL = Cond(torch.tensor([1, 2, 3])), Cond(torch.tensor([0, 0, 0]))


def _bind(quantity=None, **options):
    quantity = quantity or Velocity()
    network = GaussianNetwork(PATHS["linear"], quantity, **options).requires_grad_(False)
    return network, lambda cond: DenoisingField(network, PATHS["linear"], quantity, cond)


T = torch.tensor(0.5, dtype=torch.float64)


def test_scale_one_is_no_guidance():
    network, bind = _bind()
    plain = Euler(4)(NoGuidance()(bind, COND, NULL), X_1, RANDOM)
    network.calls.clear()
    guided = Euler(4)(ClassifierFreeGuidance(1.0)(bind, COND, NULL), X_1, RANDOM)
    assert torch.equal(guided, plain) and [size for size, _ in network.calls] == [3] * 4


def test_guidance_extrapolates_from_the_null_prediction():
    _, bind = _bind(variance_head=True)
    cond, null = bind(COND)(X_1, T), bind(NULL)(X_1, T)
    for scale in (0.0, 0.5, 1.5, 4.0):
        out = ClassifierFreeGuidance(scale)(bind, COND, NULL)(X_1, T)
        torch.testing.assert_close(out.pred, null.pred + scale * (cond.pred - null.pred))
        torch.testing.assert_close(out.heads["variance"], cond.heads["variance"])


def test_some_channels_only_keeps_the_conditional_rest():
    _, bind = _bind(Noise(), variance_head=True)
    cond = bind(COND)(X_1, T)
    some = ClassifierFreeGuidance(2.0, channels=3)(bind, COND, NULL)(X_1, T)
    full = ClassifierFreeGuidance(2.0)(bind, COND, NULL)(X_1, T)
    torch.testing.assert_close(some.pred[:, :3], full.pred[:, :3])
    torch.testing.assert_close(some.pred[:, 3:], cond.pred[:, 3:])
    assert not torch.allclose(full.pred[:, 3:], cond.pred[:, 3:])


def test_unguided_times_cost_half_and_both_ends_are_guided():
    network, bind = _bind()
    field = ClassifierFreeGuidance(2.0, interval=(0.25, 0.75))(bind, COND, NULL)
    Euler(4)(field, X_1, RANDOM)
    assert network.calls == [(3, 1.0), (6, 0.75), (6, 0.5), (6, 0.25)]
    network.calls.clear()
    plain = bind(COND)(X_1, torch.tensor(0.9, dtype=torch.float64)).pred
    torch.testing.assert_close(field(X_1, torch.tensor(0.9, dtype=torch.float64)).pred, plain)


def test_an_open_interval_leaves_out_its_ends_however_they_were_rounded():
    network, bind = _bind()
    field = ClassifierFreeGuidance(2.0, interval=(0.25, 0.75), open_interval=True)(bind, COND, NULL)
    Euler(4)(field, X_1, RANDOM)
    assert [size for size, _ in network.calls] == [3, 3, 6, 3]
    # 1 - 0.3 and 0.7 differ in the last digit of float64, and are one time.
    field = ClassifierFreeGuidance(2.0, interval=(0.0, 1 - 0.3), open_interval=True)(bind, COND, NULL)
    low, high = torch.tensor(0.7 - 1e-15, dtype=torch.float64), torch.tensor(0.699, dtype=torch.float64)
    assert not field.guides(low) and field.guides(high)
    assert not ClassifierFreeGuidance(2.0, open_interval=True)(bind, COND, NULL).guides(torch.tensor(1.0))


def test_other_channels_may_have_their_own_scale():
    _, bind = _bind()
    cond, null = bind(COND)(X_1, T).pred, bind(NULL)(X_1, T).pred
    field = ClassifierFreeGuidance(1.0, channels=3, other_scale=2.5)(bind, COND, NULL)
    found = field(X_1, T).pred
    torch.testing.assert_close(found[:, :3], cond[:, :3])
    torch.testing.assert_close(found[:, 3:], (null + 2.5 * (cond - null))[:, 3:])


def test_a_carry_that_is_kept_is_of_both_halves():
    network, bind = _bind(uses_carry=True)
    field = ClassifierFreeGuidance(2.0, interval=(0.0, 0.5))(bind, COND, NULL)
    late, early = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    out = field(X_1, early, ANEW)
    assert out.carry == 6 and field.uses_carry
    torch.testing.assert_close(out.pred, bind(COND)(X_1, early).pred)
    network.calls.clear()
    assert field(X_1, late, out.carry).pred.shape == X_1.shape
    assert [size for size, _ in network.calls] == [6]


def test_a_carry_that_nobody_keeps_costs_no_second_half():
    network, bind = _bind(uses_carry=True)
    field = ClassifierFreeGuidance(2.0, interval=(0.0, 0.5))(bind, COND, NULL)
    Euler(4)(field, X_1, RANDOM)
    assert [size for size, _ in network.calls] == [3, 3, 6, 6]
    network.calls.clear()
    SharedCarry(Euler(4), Every(2))(field, X_1, RANDOM)
    assert [size for size, _ in network.calls] == [6, 6, 6, 6]


def test_heun_decides_about_guidance_at_the_start_of_a_step():
    network, bind = _bind()
    field = ClassifierFreeGuidance(2.0, interval=(0.0, 0.5))(bind, COND, NULL)
    Heun(2)(field, X_1, RANDOM)
    # The step from 1 to 0.5 is unguided in both of its calls, the step from 0.5 to 0 guided in both.
    assert network.calls == [(3, 1.0), (3, 0.5), (6, 0.5), (6, 0.0)]


def test_guidance_nests():
    _, bind = _bind()
    inner = ClassifierFreeGuidance(2.0)
    outer = ClassifierFreeGuidance(3.0)(lambda cond: inner(bind, cond, _null_for(cond)), COND, NULL)
    cond, null = bind(COND)(X_1, T).pred, bind(NULL)(X_1, T).pred
    inner_pred = null + 2 * (cond - null)
    torch.testing.assert_close(outer(X_1, T).pred, null + 3 * (inner_pred - null))
    assert outer.path is PATHS["linear"]


def _null_for(cond):
    return cond.map(torch.zeros_like)


def test_streams_are_guided_all_together():
    a, b = (Streams(x=torch.full((2, 3), v), y=torch.full((2, 1), v)) for v in (1.0, 3.0))
    guided = guide(a, b, 2.0)
    assert guided["x"].unique().tolist() == [-1.0] and guided["y"].unique().tolist() == [-1.0]
    with pytest.raises(UserError, match=r"guidance\.channels"):
        guide(a, b, 2.0, channels=3)


@pytest.mark.parametrize(
    "options", [{"interval": (0.7, 0.2)}, {"interval": (-0.1, 1)}, {"channels": 0}, {"other_scale": 2.0}]
)
def test_wrong_options_are_one_line_with_the_key(options):
    with pytest.raises(UserError, match=r"guidance\.(interval|channels|other_scale)"):
        ClassifierFreeGuidance(2.0, **options)
