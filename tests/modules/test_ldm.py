"""LDM's module: what is optimised, averaged and kept; its contract; pictures of other sizes."""

import pytest
import torch

from repalign.errors import UserError
from repalign.random import SampleRandom
from tasks.build import assemble
from tasks.launch import compose


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))

    def make(recipe, *words):
        cfg = compose([f"experiment={recipe}", "debug=tiny", f"paths.runs={tmp_path}", *words])
        return assemble(cfg)

    return make


def test_conditioner_and_log_variance_are_optimised_and_not_averaged(module_of):
    module = module_of("ldm_f4", "objective.learn_log_variance=true").module
    learned = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    for parameter in (module.conditioner.embedding.weight, module.objective.log_variance):
        assert id(parameter) in learned
    keys = module.state_dict().keys()
    assert {"conditioner.embedding.weight", "objective.log_variance"} <= keys
    assert not any("embedding.weight" in key for key in keys if key.startswith("ema."))
    assert all(id(p) in learned for p in module.trained.parameters())


def test_the_scale_of_the_first_batch_is_kept_and_used(module_of):
    module = module_of("ldm_f8").module
    module.train()
    norm = module.autoencoder.norm
    norm.normalize(5 * torch.randn(4, 8, 4, 4))
    state = module.state_dict()
    assert float(state["measured.norm.scale"]) == pytest.approx(1 / 5, rel=0.2)
    assert not any("norm.scale" in key for key in state if key.startswith(("ema", "frozen")))
    other = module_of("ldm_f8").module
    other.load_state_dict(state)
    assert torch.equal(other.generator().norm.scale, norm.scale)


def test_the_contract(module_of):
    words = "path=linear objective=denoising clock=native time_sampler=uniform sampler=euler parametrization=noise"
    with pytest.raises(UserError, match="LDM: needs the discrete path"):
        module_of("u_repa_ldm_f8", "method=ldm", "aligner=none", *words.split())
    with pytest.raises(UserError, match="LDM: predicts noise, data or v"):
        module_of("ldm_f8", "parametrization=velocity")
    with pytest.raises(UserError, match="DiT reads no text, which conditioner=LabelTokenConditioner gives"):
        module_of("sit_s", "conditioner=label_token")
    with pytest.raises(UserError, match=r"data.keep_images: false, but LowResolutionConditioner reads pictures"):
        module_of("ldm_superres", "data.keep_images=false")


@pytest.mark.parametrize("recipe", ["ldm_text", "ldm_inpaint", "ldm_layout"])
def test_pictures_are_drawn_under_the_conditions_of_the_data(recipe, module_of):
    module = module_of(recipe).module.eval()
    for parameter in module.ema.module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    # By caption where nothing but captions is read, by class otherwise.
    wanted = ["a cat", "two dogs", ""] if recipe == "ldm_text" else torch.tensor([0, 1, 2])
    whole = module.generator()(wanted, SampleRandom(0, range(3)))
    assert whole.shape == (3, 3, 32, 32) and torch.isfinite(whole).all()
    alone = module.generator()(wanted[1:2], SampleRandom(0, [1]))
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-3, atol=1e-3)


def test_a_checkpoint_draws_larger_pictures(module_of):
    """Convolutional sampling: the weights of one size in the composition of another."""
    small, large = module_of("ldm_f8").module, module_of("ldm_f8", "data.image_size=64").module.eval()
    large.load_state_dict(small.state_dict())
    assert large.generator()(torch.tensor([0]), SampleRandom(0, [0])).shape == (1, 3, 64, 64)
