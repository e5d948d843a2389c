"""Recomputed and compiled blocks give the numbers of plain ones, for every kind of network and method."""

import copy

import pytest
import torch

from repalign.errors import UserError
from repalign.random import SampleRandom
from repalign.state import Cond
from repalign.training.policies import compile_blocks, recompute, units_of
from tasks.build import assemble
from tasks.launch import compose

# One recipe per kind of network; each method's taps, draws and teachers are those of its recipe.
NETWORKS = (
    "repa_sit_s",
    "sra_sit_b",
    "ddt_b",
    "sd3_d15",
    "redi_sit_b",
    "u_repa_sit_s",
    "repa_deepflow_sit_b",
    "cross_dit_embedded",
    "ldm_f8",
    "ldm_text",
)


def module_of(recipe, *words):
    assembly = assemble(compose([f"experiment={recipe}", "debug=tiny", *words]))
    torch.manual_seed(1)
    for weight in assembly.module.parameters():  # zero-initialised modulations would hide the blocks
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    assembly.data.setup("fit")
    batch = next(iter(assembly.data.train_dataloader()))
    return assembly.module, {name: value for name, value in batch.items()}


def loss_and_gradients(module, batch):
    module.train().zero_grad()
    module._trainer = type("Trainer", (), {"accumulate_grad_batches": 1})()
    loss = module.training_step(dict(batch), 0)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", NETWORKS)
def test_recomputed_blocks_have_identical_losses_and_gradients(recipe):
    words = ["backbone.dropout=0.1"] if recipe.startswith("ldm") else []
    plain, batch = module_of(recipe, *words)
    loss, gradients = loss_and_gradients(plain, batch)
    leaner, _ = module_of(recipe, *words, "activations=recompute")
    calls = count_calls(leaner)
    found, other = loss_and_gradients(leaner, batch)
    assert torch.equal(found, loss)
    assert other.keys() == gradients.keys()
    assert all(torch.equal(other[name], gradients[name]) for name in gradients)
    assert sum(calls) > len(calls)  # some blocks did run twice
    assert leaner.state_dict().keys() == plain.state_dict().keys()


def count_calls(module):
    """How often the inside of each block runs."""
    calls = [0] * len(units_of(module.backbone))
    for place, block in enumerate(units_of(module.backbone)):
        layer = next(layer for layer in block.modules() if isinstance(layer, torch.nn.Linear))

        def note(*_, place=place):
            calls[place] += 1

        layer.register_forward_hook(note)
    return calls


def test_every_other_block_is_recomputed():
    module, batch = module_of("repa_sit_s", "activations=recompute", "activations.every=2")
    calls = count_calls(module)
    loss_and_gradients(module, batch)
    assert set(calls[1::2]) == {max(1, min(calls))}
    assert set(calls[::2]) == {2 * min(calls)}


def test_gradients_pass_through_a_frozen_network():
    """REPA-E's first phase: the latent has a gradient, the recomputed blocks' own weights have none."""
    found = []
    for words in ([], ["activations=recompute"]):
        module, _ = module_of("repa_sit_s", *words)
        backbone = module.backbone.requires_grad_(False).eval()
        x_t = SampleRandom(0, range(4)).normal("x", module.latent_shape).requires_grad_()
        out = backbone(x_t, torch.full((4,), 0.3), Cond(label=torch.arange(4)), taps=["block.4"], only_taps=True)
        (gradient,) = torch.autograd.grad(out.taps["block.4"].data.square().sum(), x_t)
        found.append(gradient)
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_a_network_without_blocks_is_refused():
    with pytest.raises(UserError, match="lists no blocks"):
        recompute(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="activations.every"):
        recompute(torch.nn.Linear(2, 2), every=0)  # pyright: ignore[reportArgumentType]


# The compiler looks at .grad of every input; it mutes that warning, but an error in its place gets past the muting.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["repa_sit_s", "ddt_b", "sd3_d15"])
@pytest.mark.parametrize("words", [[], ["activations=recompute"]])
def test_compiled_blocks_equal_eager_ones(recipe, words):
    plain, batch = module_of(recipe)
    loss, gradients = loss_and_gradients(plain, batch)
    compiled, _ = module_of(recipe, "compile=blocks", *words)
    found, other = loss_and_gradients(compiled, batch)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    for name in gradients:
        scale = max(1.0, float(gradients[name].abs().max()))
        torch.testing.assert_close(other[name] / scale, gradients[name] / scale, rtol=0, atol=1e-5)


def test_compilation_is_asked_for_block_by_block(monkeypatch):
    module, _ = module_of("repa_sit_s")
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append((self, options)))
    compile_blocks(module.backbone, dynamic=False)
    assert [block for block, _ in asked] == list(units_of(module.backbone))
    assert copy.copy(asked[0][1]) == {"dynamic": False}
