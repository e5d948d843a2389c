"""Samplers: exact cases, convergence, independence of the batch, last steps, errors."""

from __future__ import annotations

import pytest
import torch

from repalign.errors import UserError
from repalign.paths.parametrization import Noise, Score, Velocity
from repalign.paths.vp import DiscreteVPPath
from repalign.protocols import Sampler
from repalign.random import SampleRandom
from repalign.samplers.adaptive import Adaptive
from repalign.samplers.ddim import DDIM
from repalign.samplers.ddpm import DDPM
from repalign.samplers.diffusion import Linear
from repalign.samplers.dpm_solver import DPMSolverPlusPlus
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.grid import time_grid
from repalign.samplers.heun import Heun
from repalign.samplers.multistep import LinearMultistep
from repalign.samplers.plms import PLMS
from repalign.state import Cond, Streams
from tests.laws.exact import PATHS, QUANTITIES, Generated, exact_field

RANDOM = SampleRandom(3, range(5))
X_1 = RANDOM.normal("x_1", (2, 3))
SAMPLERS = {
    "euler": Euler(6),
    "euler_shift": Euler(6, shift=3.0),
    "heun": Heun(4),
    "heun_repa": Heun(4, correct_last=False, dtype="float64"),
    "heun_reuse": Heun(6, correct_last=False, reuse_slope=True, last_step_size=0.05),
    "multistep": LinearMultistep(6, 3),
    "multistep_log": LinearMultistep(6, 2, "log_snr", shift=2.0),
    "sde": EulerMaruyama(6),
    "sde_mean": EulerMaruyama(6, last_step="euler", method="mean"),
    "sde_heun": EulerMaruyama(5, "decreasing", "tweedie", method="heun"),
    "sde_repa": EulerMaruyama(6, Linear(), dtype="float64"),
    "rk4": Adaptive("rk4", steps=4),
    "ddpm": DDPM("8"),
    "ddpm_fixed": DDPM(8, variance="fixed_large", clip=True),
    "ddim": DDIM("8", eta=0.5),
    "dd_ldm": DDIM("ldm8", eta=0.5, end="first_step"),
    "dd_plms": PLMS("8"),
    "dd_solver": DPMSolverPlusPlus(8),
    "solver_time": DPMSolverPlusPlus(6, 3, spacing="time"),
}
ODES = {
    "euler": Euler(400),
    "heun": Heun(60),
    "heun_repa": Heun(150, correct_last=False),
    "rk4": Adaptive("rk4", steps=60),
}


def _field(name, cond=None, **options):
    if name.startswith("dd"):
        return exact_field(PATHS["ddpm"], Noise(), cond, variance_head=True, **options)
    return exact_field(PATHS["linear"], Velocity(), cond, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    label = torch.tensor([0, 1, 2, 0, 1])
    whole = SAMPLERS[name](_field(name, Cond(label)), X_1, RANDOM)
    assert isinstance(SAMPLERS[name], Sampler) and torch.isfinite(whole).all()
    some = [3, 1]
    part = SAMPLERS[name](_field(name, Cond(label[some])), X_1[some], SampleRandom(3, some))
    torch.testing.assert_close(part, whole[some], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_streams_sample_as_their_tensors_do(name):
    sampler = SAMPLERS[name]
    both = Streams(a=X_1, b=2 * X_1)
    if name.startswith("dd") or name.startswith("sde"):
        # The noise of a stream has the stream's name, so that only the states' form can be compared.
        found = sampler(_field(name), both, RANDOM)
        assert isinstance(found, Streams) and found["a"].shape == X_1.shape and torch.isfinite(found["b"]).all()
        return
    found = sampler(_field(name), both, RANDOM)
    torch.testing.assert_close(found["a"], sampler(_field(name), X_1, RANDOM))
    torch.testing.assert_close(found["b"], sampler(_field(name), 2 * X_1, RANDOM))


@pytest.mark.parametrize("name", SAMPLERS)
def test_trace_sees_every_state_and_the_last_is_the_result(name):
    states = []
    result = SAMPLERS[name](_field(name), X_1, RANDOM, trace=states.append)
    steps = {"heun": 4, "heun_repa": 4, "sde_heun": 5, "rk4": 4}.get(name, 8 if name.startswith("dd") else 6)
    assert len(states) == steps and torch.equal(states[-1], result)
    assert result.dtype == (torch.float64 if "repa" in name else torch.float32)


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_reaches_a_single_point(path, steps):
    field = exact_field(PATHS[path], Velocity(), mean=0.7, std=0.0)
    found = Euler(steps, dtype="float64")(field, X_1, RANDOM)
    if path == "linear":
        # A straight line: exact whatever the number of steps.
        torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=0, atol=1e-12)
    else:
        assert (found - 0.7).abs().max() < 4 / steps


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("solver", ODES)
def test_every_prediction_on_every_path_gives_the_data(path, quantity, solver):
    # The flow between N(0, 1) and N(mean, std^2) is linear in x: quantiles stay quantiles.
    field = exact_field(PATHS[path], QUANTITIES[quantity])
    found = ODES[solver](field, X_1.double(), RANDOM)
    torch.testing.assert_close(found, (0.5 + 0.5 * X_1), rtol=0.02, atol=0.03)


def test_heun_converges_faster_than_euler():
    field, exact = exact_field(PATHS["gvp"], Velocity()), 0.5 + 0.5 * X_1.double()

    def error(sampler):
        return float((sampler(field, X_1, RANDOM) - exact).abs().max())

    assert 1.7 < error(Euler(20, dtype="float64")) / error(Euler(40, dtype="float64")) < 2.3
    assert 3.4 < error(Heun(20, dtype="float64")) / error(Heun(40, dtype="float64")) < 4.6


def test_adaptive_agrees_with_fine_steps():
    field = exact_field(PATHS["gvp"], Velocity())
    fine = Heun(400, dtype="float64")(field, X_1, RANDOM)
    for method in ("dopri5", "bosh3"):
        found = Adaptive(method, atol=1e-8, rtol=1e-8, dtype="float64")(field, X_1, RANDOM)
        torch.testing.assert_close(found, fine, rtol=1e-4, atol=1e-5)
    streams = Adaptive(atol=1e-8, rtol=1e-8, dtype="float64")(field, Streams(a=X_1, b=2 * X_1), RANDOM)
    torch.testing.assert_close(streams["a"], fine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_adaptive_never_leaves_the_interval(quantity):
    field = exact_field(PATHS["vp"], QUANTITIES[quantity])
    assert torch.isfinite(Adaptive()(field, X_1, RANDOM)).all()
    times = [t for _, t in field.backbone.calls]
    assert min(times) >= 1e-3 - 1e-7 and max(times) <= 1


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (Euler(5), [1.0, 0.8, 0.6, 0.4, 0.2]),
        (Heun(2), [1.0, 0.5, 0.5, 0.0]),
        (Heun(2, correct_last=False), [1.0, 0.5, 0.5]),
        (EulerMaruyama(4), [1.0, 0.68, 0.36, 0.04]),
        (EulerMaruyama(3, last_step="none"), [1.0, 0.5]),
        (EulerMaruyama(3, method="heun"), [1.0, 0.52, 0.52, 0.04, 0.04]),
        (Euler(2, shift=3.0), [1.0, 0.75]),
        (Euler(2, start=0.8, end=0.2), [0.8, 0.5]),
    ],
)
def test_calls_of_the_field(sampler, calls):
    field = exact_field(PATHS["linear"], Velocity())
    sampler(field, X_1, RANDOM)
    assert [t for _, t in field.backbone.calls] == pytest.approx(calls, abs=1e-6)


def test_ddim_without_noise_is_deterministic_and_reaches_a_point():
    field = exact_field(PATHS["ddpm"], Noise(), mean=0.7, std=0.0)
    one, two = (DDIM("20", eta=0.0, dtype="float64")(field, X_1, SampleRandom(seed, range(5))) for seed in (1, 2))
    assert torch.equal(one, two)
    # The network's times are float32, and 1/alpha at t = 1 is 158.
    torch.testing.assert_close(one, torch.full_like(one, 0.7), rtol=0, atol=1e-4)
    noisy = [
        DDIM("20", eta=1.0)(field, X_1, SampleRandom(seed, range(5)), trace=(seen := []).append) for seed in (1, 2)
    ]
    assert len(seen) == 20
    torch.testing.assert_close(noisy[0], noisy[1], rtol=0, atol=1e-3)  # one point, whatever the way


@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(100),
        DDIM(100, eta=1.0),
        DDPM(200, variance="fixed_small"),
        DDPM(200, variance="fixed_large"),
        DDPM("100,60,40", variance="fixed_small"),
    ],
)
def test_discrete_samplers_give_the_data(sampler):
    count = 2000
    field = exact_field(PATHS["ddpm"], Noise())
    x = sampler(field, SampleRandom(6, range(count)).normal("x_1", (1,)), Generated(count, 0))
    assert float(x.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(x.std()) == pytest.approx(0.5, abs=0.06)


def test_respaced_chains_call_the_network_at_the_kept_times():
    field = _field("ddpm")
    path = DiscreteVPPath().respaced("10,5,3")
    DDPM("10,5,3")(field, X_1, RANDOM)
    assert [t for _, t in field.backbone.calls] == pytest.approx(path.times.flip(0).tolist(), abs=1e-6)


def test_clipping_bounds_the_estimate_of_the_data():
    field = exact_field(PATHS["ddpm"], Noise(), mean=3.0, std=0.1, variance_head=True)
    assert DDPM(10, clip=True)(field, X_1, RANDOM).max() == 1
    assert DDIM(10, clip=True)(field, X_1, RANDOM).max() <= 1
    assert DDIM(10, clip=False)(field, X_1, RANDOM).min() > 2


def test_a_float64_trajectory_around_a_float32_network():
    field = exact_field(PATHS["linear"], Velocity(), dtype=torch.float32)
    seen = []
    field.backbone.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, args[1].dtype)))
    assert Euler(3, dtype="float64")(field, X_1, RANDOM).dtype == torch.float64
    assert set(seen) == {(torch.float32, torch.float32)}
    field.backbone.to(torch.bfloat16)
    field(X_1.double(), torch.tensor(0.5))
    # Times keep float32 around a half-precision network.
    assert seen[-1] == (torch.bfloat16, torch.float32)


def test_samplers_have_finite_gradients():
    for name, sampler in SAMPLERS.items():
        field = _field(name)
        field.backbone.requires_grad_(True)
        x_1 = X_1.clone().requires_grad_()
        sampler(field, x_1, RANDOM).sum().backward()
        assert torch.isfinite(x_1.grad).all() and torch.isfinite(field.backbone.mean.grad)


def test_grid_is_uniform_before_the_shift():
    torch.testing.assert_close(time_grid(1.0, 0.0, 4), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0], dtype=torch.float64))
    assert time_grid(1.0, 0.0, 4, shift=3.0)[[0, -1]].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Euler(0)(_field("euler"), X_1, RANDOM), "sampler.steps"),
        (lambda: Euler(5, start=0.2, end=0.4)(_field("euler"), X_1, RANDOM), "start=0.2"),
        (lambda: Euler(5, shift=0.0)(_field("euler"), X_1, RANDOM), "sampler.shift"),
        (lambda: Euler(5, dtype="float16")(_field("euler"), X_1, RANDOM), "sampler.dtype"),
        (lambda: EulerMaruyama(1), "sampler.steps"),
        (lambda: EulerMaruyama(5, last_step="men"), "Did you mean 'mean'"),
        (lambda: EulerMaruyama(5, method="huen"), "Did you mean 'heun'"),
        (lambda: EulerMaruyama(5, "sgma"), "Did you mean 'sigma'"),
        (lambda: EulerMaruyama(5, last_step="none", method="heun")(_field("euler"), X_1, RANDOM), "sampler.end"),
        (lambda: Adaptive("dopri6"), "Did you mean 'dopri"),
        (lambda: Adaptive("rk4"), "sampler.steps"),
        (lambda: Adaptive("dopri5", steps=4), "sampler.steps"),
        (lambda: DDPM(variance="learnt"), "Did you mean 'learned'"),
        (lambda: DDPM(5)(exact_field(PATHS["ddpm"], Noise()), X_1, RANDOM), "backbone.variance_head"),
        (lambda: DDPM(5)(_field("euler"), X_1, RANDOM), "path=ddpm"),
        (lambda: DDIM(5)(exact_field(PATHS["vp"], Score()), X_1, RANDOM), "path=ddpm"),
        (lambda: DDIM(eta=1.5), "sampler.eta"),
    ],
)
def test_wrong_options_are_one_line_with_the_key(make, says):
    with pytest.raises(UserError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)
