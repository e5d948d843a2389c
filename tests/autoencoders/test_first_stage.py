"""Losses of first stages: reconstruction, regularizers, adversary."""

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from repalign.autoencoders.discriminator import PatchDiscriminator
from repalign.autoencoders.pixels import Pixels
from repalign.autoencoders.quantizer import VectorQuantizer
from repalign.errors import UserError
from repalign.objectives import regularizers
from repalign.objectives.adversarial import Adversarial
from repalign.objectives.first_stage import FirstStage
from repalign.objectives.reconstruction import Reconstruction
from repalign.objectives.regularizers import CodebookRegularizer, KLRegularizer
from repalign.random import SampleRandom
from repalign.state import Gaussian
from tests.autoencoders.test_autoencoders import BUILDERS, small, vq

KL = KLRegularizer(weight=1e-3)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def noise(batch=2):
    return SampleRandom(0, range(batch))


@pytest.mark.parametrize("name", [n for n in BUILDERS if n != "pixels"])
def test_gradients_reach_every_parameter_and_are_finite(name, images):
    torch.manual_seed(0)
    autoencoder = BUILDERS[name]()
    with torch.no_grad():  # a block that begins at the identity would hide the gradient of its first half
        for parameter in autoencoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    regularizer = CodebookRegularizer() if name.startswith("vq") else KL
    Reconstruction(regularizer=regularizer)(autoencoder, images, noise()).total.mean().backward()
    for key, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


def test_kl_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 3, 4, 4, generator=generator), torch.rand(2, 3, 4, 4, generator=generator) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(torch.zeros(()), torch.ones(())))
    torch.testing.assert_close(regularizers.kl_divergence(Gaussian(mean, std)), expected)


def test_losses_are_per_sample_and_weighted_once(images):
    autoencoder = small()
    objective = Reconstruction(
        l1=2.0,
        mse=3.0,
        perceptual=lambda a, b: (a - b).flatten(1).std(1),
        perceptual_weight=0.7,
        regularizer=KLRegularizer(weight=0.5, reduction="mean"),
    )
    result = objective(autoencoder, images, SampleRandom(0, [3, 4]))
    terms = result.losses
    assert set(terms) == {"l1", "mse", "perceptual", "kl"}
    torch.testing.assert_close(result.nll, 2 * terms["l1"] + 3 * terms["mse"] + 0.7 * terms["perceptual"])
    torch.testing.assert_close(result.total, result.nll + 0.5 * terms["kl"])
    assert result.total.shape == (2,) and result.images.shape == images.shape
    # The same sample alone has the same losses: its noise is its own.
    alone = objective(autoencoder, images[1:], SampleRandom(0, [4]))
    torch.testing.assert_close(alone.total, result.total[1:], atol=1e-5, rtol=1e-5)


def test_a_sum_adds_the_perceptual_distance_to_every_element_and_the_log_variance_too(images):
    autoencoder = small()
    parts = {"perceptual": lambda a, b: (a - b).flatten(1).std(1), "regularizer": KL, "log_variance": 0.3}
    result = Reconstruction(reduction="sum", **parts)(autoencoder, images, noise())
    distance = result.losses["perceptual"].reshape(-1, 1, 1, 1)
    elements = ((result.output - result.target).abs() + distance) / torch.tensor(0.3).exp() + 0.3
    torch.testing.assert_close(result.nll, elements.sum((1, 2, 3)))


def test_reductions_of_the_kl_term(images):
    mean, total = (
        Reconstruction(regularizer=KLRegularizer(weight=1.0, reduction=reduction))(small(), images, noise())
        for reduction in ("mean", "sum")
    )
    assert mean.losses["kl"].shape == total.losses["kl"].shape == (2,)
    autoencoder = small()
    latents = [
        KLRegularizer(weight=1.0, reduction=r)(autoencoder, autoencoder.encode(images), noise()).losses["kl"]
        for r in ("mean", "sum")
    ]
    torch.testing.assert_close(latents[1], latents[0] * 8 * 4 * 4)


def test_unknown_choices_are_named():
    with pytest.raises(UserError, match=r"reconstruction\.reduction: unknown choice 'mena'. Did you mean 'mean'"):
        Reconstruction(regularizer=KL, reduction="mena")
    with pytest.raises(UserError, match=r"regularizer\.reduction: unknown choice 'sun'. Did you mean 'sum'"):
        KLRegularizer(weight=1.0, reduction="sun")
    with pytest.raises(UserError, match=r"adversarial\.loss: unknown choice 'hing'. Did you mean 'hinge'"):
        Adversarial(discriminator=nn.Identity(), loss="hing")


def test_latent_noise_disturbs_what_is_decoded(images):
    autoencoder = small()
    plain, noisy = (
        Reconstruction(regularizer=KLRegularizer(weight=1.0, latent_noise=s))(autoencoder, images, noise()).losses
        for s in (0.0, 2.0)
    )
    torch.testing.assert_close(plain["kl"], noisy["kl"])
    assert not torch.allclose(plain["l1"], noisy["l1"])


def test_loss_has_a_gradient_where_the_picture_would_be_clamped():
    level = torch.tensor(3.0, requires_grad=True)

    class Overshoot:
        def encode(self, images):
            return Gaussian(Pixels().encode(images).mean, torch.ones_like(images))

        def decode_unclamped(self, raw):
            return raw * 0 + level

    Reconstruction(regularizer=KL)(Overshoot(), torch.rand(1, 3, 4, 4), noise(1)).total.sum().backward()
    assert level.grad > 0


def test_codes_are_the_nearest_and_the_gradient_passes_straight_through():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes=7, dim=3)
    nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    found = quantizer(z)
    points = z.permute(0, 2, 3, 1).reshape(-1, 3)
    expected = torch.cdist(points, quantizer.embedding.weight).argmin(1)
    assert torch.equal(found.indices.flatten(), expected)
    nearest = quantizer.embedding.weight[expected].reshape(2, 4, 5, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found.latent, nearest)
    weight = torch.randn_like(z)
    (gradient,) = torch.autograd.grad((found.latent * weight).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, weight)
    again = quantizer(found.latent.detach())
    assert torch.equal(again.indices, found.indices)
    usage = quantizer.usage(found.indices)
    assert usage["codes_used"] == len(expected.unique()) and 1 <= usage["perplexity"] <= 7
    assert quantizer.usage(torch.arange(7))["perplexity"].item() == pytest.approx(7)


@pytest.mark.parametrize("legacy", [True, False])
def test_beta_is_on_the_codes_in_legacy_and_on_the_encoder_in_the_paper(legacy):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes=5, dim=2, beta=0.25, legacy=legacy)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    (to_z,) = torch.autograd.grad(quantizer(z).loss.sum(), z)
    pull = 2 * (z - quantizer(z).latent).detach() / z.numel()
    torch.testing.assert_close(to_z, pull if legacy else 0.25 * pull)
    (to_codes,) = torch.autograd.grad(quantizer(z).loss.sum(), quantizer.embedding.weight)
    torch.testing.assert_close(to_codes.sum(0), -pull.sum((0, 2, 3)) * (0.25 if legacy else 1.0))


def test_a_vq_autoencoder_diffuses_what_lies_before_the_codebook(images):
    autoencoder = vq().eval()
    with torch.no_grad():
        raw = autoencoder.encode(images).mean
        codes = autoencoder.quantize(raw)
        assert not torch.allclose(raw, codes.latent)
        torch.testing.assert_close(autoencoder.decode(raw), autoencoder.decode(codes.latent))
        # A small error of a diffusion model does not change the picture as long as the codes stay.
        nudged = raw + 1e-6
        assert torch.equal(autoencoder.quantize(nudged).indices, codes.indices)
        torch.testing.assert_close(autoencoder.decode(nudged), autoencoder.decode(raw))


def stage(**adversarial):
    torch.manual_seed(0)
    adversary = Adversarial(discriminator=PatchDiscriminator(width=8, layers=2), **adversarial)
    return FirstStage(reconstruction=Reconstruction(regularizer=KL), adversarial=adversary)


def test_nothing_is_adversarial_before_the_start(images):
    autoencoder, judged = small(), stage(start=10, weight=0.5)
    shared = judged.reconstruct(autoencoder, images, noise())
    before, after = (judged.autoencoder_loss(autoencoder, shared, step) for step in (9, 10))
    torch.testing.assert_close(before.total, shared.total.mean())
    assert "adversarial" not in before.terms
    extra = after.terms["adversarial_weight"] * after.terms["adversarial"]
    torch.testing.assert_close(after.total, shared.total.mean() + extra)
    assert judged.discriminator_loss(shared, 9).total == 0 < judged.discriminator_loss(shared, 10).total


def test_the_adaptive_weight_balances_gradients_at_the_last_layer(images):
    autoencoder, judged = small(), stage(weight=0.5)
    shared = judged.reconstruct(autoencoder, images, noise())
    terms = judged.autoencoder_loss(autoencoder, shared, 0).terms
    generator = judged.adversarial.generator_loss(shared.output).mean()
    norms = [
        torch.autograd.grad(loss, autoencoder.last_layer, retain_graph=True)[0].norm()
        for loss in (shared.nll.mean(), generator)
    ]
    torch.testing.assert_close(terms["adversarial_weight"], 0.5 * norms[0] / (norms[1] + 1e-4))
    fixed = stage(weight=0.1, adaptive=False)
    assert fixed.autoencoder_loss(autoencoder, shared, 0).terms["adversarial_weight"].item() == pytest.approx(0.1)


def test_the_discriminators_gradient_stays_with_the_discriminator(images):
    autoencoder, judged = small(), stage()
    shared = judged.reconstruct(autoencoder, images, noise())
    judged.discriminator_loss(shared, 0).total.backward()
    assert all(p.grad is None for p in autoencoder.parameters())
    assert all(p.grad is not None for p in judged.adversarial.discriminator.parameters())


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch(layers, field):
    discriminator = PatchDiscriminator(width=4, layers=layers).eval()
    picture = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(picture)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    assert picture.grad.abs().sum((0, 1, 2)).count_nonzero() == field
