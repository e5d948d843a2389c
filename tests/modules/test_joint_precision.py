"""REPA-E under bfloat16 autocast: networks in bfloat16, losses in float32."""

import math

import pytest
import torch

from repalign.autoencoders.posterior import from_log_variance
from repalign.objectives.regularizers import kl_divergence
from repalign.random import SampleRandom
from repalign.training.phase import only
from tests.modules.test_repa_e import batch, module_of
from tests.smoke.test_recipes_train import column, train


def test_every_loss_of_a_round_is_float32():
    module = module_of()
    seen = {}
    decoder = module.autoencoder.decode_unclamped
    module.autoencoder.decode_unclamped = lambda raw: seen.setdefault("decoded", decoder(raw))
    discriminator = module.parts["discriminator"]
    discriminator.register_forward_hook(lambda part, inputs, output: seen.update(logits=output))
    with torch.autocast("cpu", torch.bfloat16):
        shared = module.begin(batch(), SampleRandom(0, range(4)))
        found = {}
        for name, phase in module.phases.items():
            with only(phase, module.parts):
                found[name] = module.losses(name, shared)
    reconstructed = shared.reconstructed
    assert seen["decoded"].dtype == torch.bfloat16  # else this test would show nothing
    assert {reconstructed.posterior.mean.dtype, reconstructed.posterior.std.dtype} == {torch.float32}
    assert reconstructed.output.dtype == seen["logits"].dtype == torch.float32
    for losses in found.values():
        assert {losses.total.dtype, *(term.dtype for term in losses.terms.values())} == {torch.float32}


def test_log_variances_of_half_precision_are_exponentiated_in_float32():
    moments = torch.cat([torch.zeros(1, 1, 8, 8), torch.linspace(-40, 25, 64).reshape(1, 1, 8, 8)], 1).bfloat16()
    exact = from_log_variance(moments.double())
    posterior = from_log_variance(moments)
    assert posterior.std.dtype == torch.float32 and exact.std.dtype == torch.float64
    torch.testing.assert_close(posterior.std.double(), exact.std, rtol=1e-6, atol=0)
    torch.testing.assert_close(kl_divergence(posterior).double(), kl_divergence(exact), rtol=1e-5, atol=1e-6)


def test_a_run_in_bfloat16_is_near_the_one_in_float32(tmp_path):
    runs = {
        precision: train(tmp_path / precision, "experiment=repa_e_sit_s", "steps=3", f"trainer.precision={precision}")
        for precision in ("32-true", "bf16-mixed")
    }
    terms = {
        "loss/autoencoder": 0.02,
        "loss/discriminator": 0.02,
        "loss/denoiser": 0.02,
        "autoencoder/l1": 0.02,
        "autoencoder/perceptual": 0.02,
        "autoencoder/kl": 0.02,
        "grad_norm/autoencoder": 0.1,
        "grad_norm/discriminator": 0.1,
        "grad_norm/denoiser": 0.1,
    }
    for term, tolerance in terms.items():
        exact, half = (column(run, f"train/{term}") for run in runs.values())
        assert len(half) == 3 and all(math.isfinite(value) for value in half)
        assert half == pytest.approx(exact, rel=tolerance, abs=0.01), term
    assert column(runs["32-true"], "train/loss/denoiser") != column(runs["bf16-mixed"], "train/loss/denoiser")
