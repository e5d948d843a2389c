"""Sharing a carry between steps: what it changes, what it costs, which steps are chosen."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from safetensors.torch import save_file

from repalign.backbones.clocks import ReversedClock
from repalign.backbones.ddt import DDT
from repalign.errors import UserError
from repalign.guidance.cfg import ClassifierFreeGuidance, NoGuidance
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.random import SampleRandom
from repalign.samplers.ddim import DDIM
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.field import ANEW, DenoisingField
from repalign.samplers.heun import Heun
from repalign.samplers.multistep import LinearMultistep
from repalign.samplers.refresh import CarrySimilarity, Chosen, Every, SharedCarry, Statistical, shared
from repalign.samplers.similarity import choose_steps, read_similarity, step_similarity, write_similarity
from repalign.state import Cond
from tests.laws.exact import PATHS, exact_field

RANDOM = SampleRandom(3, range(2))
X_1 = RANDOM.normal("x_1", (4, 4, 4))
COND, NULL = Cond(torch.tensor([1, 2])), Cond(torch.tensor([3, 3]))
SAMPLERS = {
    "euler": Euler(6, last_step_size=0.04),
    "heun": Heun(4),
    "heun_reuse": Heun(6, correct_last=False, reuse_slope=True),
    "sde": EulerMaruyama(6, last_step="euler"),
    "multistep": LinearMultistep(6, 3),
}
GUIDANCE = {
    "none": NoGuidance(),
    "always": ClassifierFreeGuidance(2.0),
    "interval": ClassifierFreeGuidance(2.0, (0.2, 0.7), open_interval=True),
}


class Setting:
    """A small DDT behind its clock, its field, and how often its halves ran."""

    def __init__(self, guidance="always"):
        torch.manual_seed(0)
        net = DDT((4, 4, 4), 3, patch=2, dim=16, depth=3, encoder_depth=2, heads=2).requires_grad_(False)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.ran = {"encoder": 0, "decoder": 0}
        net.encoder[0].register_forward_hook(lambda *_: self._note("encoder"))
        net.decoder[0].register_forward_hook(lambda *_: self._note("decoder"))
        backbone = ReversedClock(net)

        def bind(cond):
            return DenoisingField(backbone, LinearPath(), Velocity(), cond)

        self.field = GUIDANCE[guidance](bind, COND, NULL)

    def _note(self, half):
        self.ran[half] += 1


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_new_carry_at_every_step_is_no_sharing(name, guidance):
    setting = Setting(guidance)
    plain = SAMPLERS[name](setting.field, X_1, RANDOM)
    before = dict(setting.ran)
    found = SharedCarry(SAMPLERS[name], Every(1))(setting.field, X_1, RANDOM)
    if guidance == "interval":  # what shares keeps both halves in the batch there, so the last bits may differ
        torch.testing.assert_close(found, plain)
    else:
        assert torch.equal(found, plain)
    assert before["encoder"] == before["decoder"] > 0
    assert setting.ran == {half: 2 * count for half, count in before.items()}


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(("schedule", "encoder"), [(Every(2), 3), (Every(4), 2), (Every(9), 1), (Chosen([0, 1, 5]), 3)])
def test_the_encoder_runs_where_the_schedule_says(schedule, encoder, guidance):
    setting = Setting(guidance)
    found = SharedCarry(SAMPLERS["euler"], schedule)(setting.field, X_1, RANDOM)
    assert setting.ran == {"encoder": encoder, "decoder": 6}
    assert found.shape == X_1.shape and torch.isfinite(found).all()


def test_heun_counts_two_evaluations_a_step():
    setting = Setting()
    SharedCarry(Heun(3), Every(2))(setting.field, X_1, RANDOM)
    assert setting.ran == {"encoder": 3, "decoder": 6}


def test_shared_steps_keep_the_older_state_of_both_halves():
    """Two steps by hand: the second is given the carry [conditional, null] of the first."""
    setting = Setting("always")
    states = []
    SharedCarry(Euler(2), Every(2))(setting.field, X_1, RANDOM, trace=states.append)
    first = setting.field(X_1, torch.tensor(1.0))
    x = X_1 - 0.5 * first.pred
    torch.testing.assert_close(states[0], x)
    second = setting.field(x, torch.tensor(0.5), first.carry)
    torch.testing.assert_close(states[1], x - 0.5 * second.pred)
    assert len(first.carry) == 2 * len(X_1)


def test_runs_forget_each_other_and_samples_do_not_depend_on_their_batch():
    setting, sampler = Setting("none"), SharedCarry(Euler(5), Every(3))
    one, two = (sampler(setting.field, X_1, RANDOM) for _ in range(2))
    assert torch.equal(one, two)


def test_less_sharing_is_nearer_to_none():
    setting = Setting()
    sampler = Euler(32)
    plain = sampler(setting.field, X_1, RANDOM)
    errors = [
        float((SharedCarry(sampler, Every(k))(setting.field, X_1, RANDOM) - plain).abs().mean()) for k in (2, 8, 32)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_measured_similarity_is_that_of_the_carries():
    setting, carries, x = Setting("interval"), [], X_1
    measured = CarrySimilarity(Euler(5))
    found = measured(setting.field, X_1, RANDOM)
    times = torch.linspace(1, 0, 6, dtype=torch.float64)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        out = setting.field(x, t, ANEW)
        carries.append(out.carry)
        x = x + (t_next - t) * out.pred
    torch.testing.assert_close(found, x)
    torch.testing.assert_close(measured.mean(), step_similarity(torch.stack(carries)))
    once = measured.mean()
    measured(setting.field, X_1, RANDOM)
    torch.testing.assert_close(measured.mean(), once)
    torch.testing.assert_close(once.diagonal(), torch.ones(5))
    torch.testing.assert_close(once, once.T)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [2, 3, 7.5])
def test_the_programme_finds_the_cheapest_steps(seed, rate):
    n = 9
    states = torch.randn(n, 2, 3, 4, generator=torch.Generator().manual_seed(seed)).cumsum(0)
    similarity = step_similarity(states).double()

    def cost(steps):
        ends = [*steps[1:], n]
        return float(sum((1 - similarity[j:i, j]).sum() for j, i in zip(steps, ends, strict=True)))

    m = int(n / rate)
    best = min(cost((0, *rest)) for rest in combinations(range(1, n), m - 1))
    chosen = choose_steps(similarity, rate)
    assert len(chosen) == m and chosen[0] == 0 and chosen == sorted(set(chosen))
    assert cost(chosen) == pytest.approx(best, abs=1e-9)


def test_a_rate_of_one_recomputes_everything_and_a_break_is_found():
    angle = torch.tensor([0.0, 0.01, 0.02, 1.0, 1.01, 1.02])
    states = torch.stack([angle.cos(), angle.sin()], -1).reshape(6, 1, 1, 2)
    similarity = step_similarity(states)
    assert choose_steps(similarity, 1) == list(range(6))
    assert choose_steps(similarity, 3) == [0, 3]
    assert choose_steps(similarity, 6) == [0]


def test_a_measured_file_serves_the_same_sampler_alone(tmp_path):
    setting, sampler = Setting(), Euler(8)
    measured = CarrySimilarity(sampler)
    measured(setting.field, X_1, RANDOM)
    write_similarity(tmp_path / "s.safetensors", measured.mean(), {"sampler": "euler"})
    torch.testing.assert_close(read_similarity(tmp_path / "s.safetensors"), measured.mean())
    schedule = Statistical(str(tmp_path / "s.safetensors"), rate=4)
    setting.ran["encoder"] = 0
    shared(8, Euler, schedule)(setting.field, X_1, RANDOM)
    assert setting.ran["encoder"] == 2
    with pytest.raises(UserError, match="made for 8 evaluations, but this sampler makes 6"):
        SharedCarry(Euler(6), schedule)(setting.field, X_1, RANDOM)


def test_mistakes_are_one_line(tmp_path):
    plain = exact_field(PATHS["linear"], Velocity())
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(1)}, foreign)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    cases = [
        (lambda: SharedCarry(Euler(3), Every(2))(plain, X_1, RANDOM), "only a backbone with a carry"),
        (lambda: SharedCarry(DDIM("4"), Every(2))(exact_field(PATHS["ddpm"], Velocity()), X_1, RANDOM), "carry"),
        (lambda: Every(0), "sampler.schedule.every"),
        (lambda: Chosen([1, 2]), "the first evaluation, 0"),
        (lambda: Statistical(str(tmp_path / "none"), 2), "measure it with task=sharing"),
        (lambda: Statistical(str(foreign), 2), "was not written by task=sharing"),
        (lambda: Statistical(str(tmp_path / "torn.safetensors"), 2), "cannot be read"),
        (lambda: choose_steps(torch.eye(4), 5), "sampler.schedule.rate"),
        (lambda: choose_steps(torch.eye(4), 0.5), "sampler.schedule.rate"),
        (lambda: CarrySimilarity(Euler(3)).mean(), "no sample"),
    ]
    for make, says in cases:
        with pytest.raises(UserError, match=says) as error:
            make()
        assert "\n" not in str(error.value)
