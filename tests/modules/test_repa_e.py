"""REPA-E: who moves whom, what is shared between the passes, and the run as a whole."""

import fnmatch
import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules.repa_e import REPAE
from repalign.errors import UserError
from repalign.random import SampleRandom
from repalign.training.phase import only
from tasks.build import assemble
from tasks.launch import compose
from tests.golden.runner import DATA, KINDS, Case, load_kinds
from tests.smoke.test_recipes_train import column, train

RECIPE = ("experiment=repa_e_sit_s", "debug=tiny")


def module_of(*words) -> REPAE:
    module = assemble(compose([*RECIPE, *words])).module
    torch.manual_seed(3)
    for parameter in module.parts["backbone"].parameters():  # zero-initialised layers pass no gradient
        torch.nn.init.normal_(parameter, std=0.1)
    return module.train()


def batch(rows=4):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"image": image, "label": torch.arange(rows) % 4}


def gradients(module, phase, shared):
    """Names of the parts (autoencoder: of its halves) that a phase's loss reaches."""
    with only(module.phases[phase], module.parts):
        module.losses(phase, shared).total.backward()
    found = {
        ".".join(name.split(".")[: 2 if name.startswith("autoencoder") else 1])
        for part, owner in module.parts.items()
        for name, p in ((f"{part}.{key}", p) for key, p in owner.named_parameters())
        if p.grad is not None and p.grad.abs().max() > 0
    }
    module.zero_grad(set_to_none=True)
    return found


def test_each_phase_moves_its_own_parts_alone():
    module = module_of()
    shared = module.begin(batch(), SampleRandom(0, range(4)))
    assert gradients(module, "autoencoder", shared) == {"autoencoder.encoder", "autoencoder.decoder"}
    assert gradients(module, "discriminator", shared) == {"discriminator"}
    assert gradients(module, "denoiser", shared) == {"backbone", "aligners"}


@pytest.mark.parametrize(("diffusion", "moves"), [(0.0, {"autoencoder.encoder"}), (1.0, {"autoencoder.encoder"})])
def test_alignment_and_diffusion_reach_the_encoder_and_never_the_decoder(diffusion, moves):
    weights = ["l1", "perceptual_weight"]
    silent = [f"method.first_stage.reconstruction.{name}=0" for name in weights]
    silent += ["method.first_stage.reconstruction.regularizer.weight=0", "method.first_stage.adversarial.weight=0"]
    module = module_of(*silent, f"method.diffusion={diffusion}", f"method.alignment={1.5 - 1.5 * diffusion}")
    shared = module.begin(batch(), SampleRandom(0, range(4)))
    assert gradients(module, "autoencoder", shared) == moves


def test_times_and_noise_are_shared_and_labels_dropped_in_the_denoiser_alone(monkeypatch):
    module = module_of("conditioner.drop=0.9")
    seen = []
    honest = module.backbone.forward

    def spy(x_t, t, cond, **options):
        seen.append((t.clone(), cond.label.clone(), module.trained["norm"].training, options["only_taps"]))
        return honest(x_t, t, cond, **options)

    monkeypatch.setattr(module.backbone, "forward", spy)
    shared = module.begin(batch(), SampleRandom(0, range(4)))
    for phase in ("autoencoder", "denoiser"):
        with only(module.phases[phase], module.parts):
            module.losses(phase, shared)
    (t_1, labels_1, training_1, stops_1), (t_2, labels_2, training_2, stops_2) = seen
    assert torch.equal(t_1, t_2) and torch.equal(labels_1, batch()["label"])
    assert (labels_2 == module.conditioner.num_classes).sum() >= 2
    assert (training_1, training_2) == (False, True) and (stops_1, stops_2) == (True, False)


def test_an_encoder_runs_once_a_round(monkeypatch):
    module = module_of()
    calls = []
    (name,) = module.encoders
    honest = module.encoders[name].forward
    monkeypatch.setattr(module.encoders[name], "forward", lambda images: calls.append(len(images)) or honest(images))
    shared = module.begin(batch(), SampleRandom(0, range(4)))
    for phase in ("autoencoder", "denoiser"):
        with only(module.phases[phase], module.parts):
            module.losses(phase, shared)
    assert calls == [4]


def test_running_statistics_move_once_per_round_and_are_averaged():
    module = module_of("ema.decay=0.5")
    before = module.trained["norm"].running_mean.clone()
    shared = module.begin(batch(), SampleRandom(0, range(4)))
    with only(module.phases["autoencoder"], module.parts):
        module.losses("autoencoder", shared)
    assert torch.equal(module.trained["norm"].running_mean, before)
    with only(module.phases["denoiser"], module.parts):
        module.losses("denoiser", shared)
    moved = module.trained["norm"].running_mean
    torch.testing.assert_close(moved, 0.9 * before + 0.1 * shared.reconstructed.latent.mean((0, 2, 3)))
    module.after_step()
    torch.testing.assert_close(module.ema.module["norm"].running_mean, (before + moved) / 2)
    assert module.generator(ema=True).norm is module.ema.module["norm"]


def test_accumulation_gives_the_same_step(tmp_path):
    """Batch norms see micro-batches, so this is without the discriminator and with still statistics."""
    words = ("~method.phases.discriminator", "method.first_stage.adversarial=null")
    still = "method.phases.denoiser.evals=[norm]"
    runs = []
    for name, accumulate in (("a", 1), ("b", 2)):
        recipe = ("experiment=repa_e_sit_s", *words, still)
        runs.append(train(tmp_path / name, *recipe, f"data.accumulate={accumulate}"))
    for term in ("train/loss", "train/grad_norm/autoencoder", "train/grad_norm/denoiser", "train/align/repa"):
        values = [torch.tensor(column(run, term)) for run in runs]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_contract():
    with pytest.raises(UserError, match="needs an aligner with an encoder target"):
        assemble(compose([*RECIPE, "aligner=none"]))
    with pytest.raises(UserError, match="go together"):
        assemble(compose([*RECIPE, "~method.phases.discriminator"]))
    with pytest.raises(UserError, match="data.cache_latents: REPAE trains the autoencoder"):
        assemble(compose([*RECIPE, "data.cache_latents=true"]))
    chain = "path=ldm parametrization=noise time_sampler=uniform_steps clock=steps sampler=ddpm"
    with pytest.raises(UserError, match="no phase that trains the weights of its objective; set another objective="):
        words = ["objective=latent_diffusion", "objective.learn_log_variance=true"]
        assemble(compose([*RECIPE, *words, *chain.split()]))
    with pytest.raises(UserError, match="Did you mean 'backbone'"):
        assemble(compose([*RECIPE, "method.phases.denoiser.trains=[backbon]"]))


def test_golden_step_moves_weights_by_the_official_amount():
    """The tolerance of the case would let most entries pass without any step: compare the updates themselves."""
    load_kinds()
    folder = DATA / "repae_train_step"
    tensors = load_file(folder / "tensors.safetensors")
    below = {
        p: {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in ("weights/", "inputs/", "outputs/")
    }
    description = json.loads((folder / "case.json").read_text())
    case = Case(description["config"], "", below["inputs/"], below["weights/"], "float32")
    found = KINDS["repa_e.train_step"](case)
    moved = [key for key in below["outputs/"] if key.startswith("after/")]
    assert moved
    for key in moved:
        start = below["weights/"][key.removeprefix("after/")]
        expected = below["outputs/"][key] - start
        assert expected.abs().max() > 5e-5
        torch.testing.assert_close(found[key] - start, expected, rtol=0, atol=1e-6)


def test_every_rule_of_the_recipes_guard_concerns_a_term():
    """A pattern that matches nothing would guard nothing."""
    module = module_of()
    shared = module.begin(batch(), SampleRandom(0, range(4)))
    names = {f"grad_norm/{phase}" for phase in module.phases}
    for phase in module.phases:
        with only(module.phases[phase], module.parts):
            names |= module.losses(phase, shared).terms.keys()
    guard = compose([*RECIPE]).callbacks.guard
    for pattern in [*guard.nonzero, *guard.bounds]:
        assert fnmatch.filter(names, pattern), pattern
    assert {"autoencoder/adversarial", "latent/std_*"} <= {*guard.nonzero, *guard.bounds}
