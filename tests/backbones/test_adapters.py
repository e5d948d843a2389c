"""Low-rank additions on every backbone: the reference is exact, the average and the checkpoint hold additions alone."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from repalign.backbones.adapters import GIVEN, merge, without_adapters
from repalign.backbones.clocks import unwrapped
from repalign.errors import UserError
from tasks.build import assemble
from tests.compatibility.matrix import architectures, batch, combination, configuration, node

pytest.importorskip("peft")


def tuned_and_given(kind, folder):
    """A tiny module of this backbone with additions, and the given network that they are on; all weights random."""
    cfg = configuration(combination({"backbone": kind}))
    given = unwrapped(assemble(cfg).module.backbone)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in given.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    file = folder / "given.safetensors"
    save_file({f"backbone/{name}": value.contiguous() for name, value in given.state_dict().items()}, file)
    cfg.tuning = copy.deepcopy(node("tuning", "lora"))
    cfg.tuning.weights, cfg.tuning.rank, cfg.tuning.layers = str(file), 2, "all"
    module = assemble(cfg).module
    with torch.no_grad():
        for owner in (module.trained, module.ema.module):
            for name, parameter in owner.named_parameters():
                if "lora_B" in name:
                    parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    module.noted = {}
    module.note = lambda total, terms: module.noted.update(terms, loss=total)
    return cfg, module, given


@pytest.mark.parametrize("kind", architectures())
def test_on_every_backbone(kind, tmp_path):
    cfg, module, given = tuned_and_given(kind, tmp_path)
    network, rows = unwrapped(module.backbone), batch(cfg)
    calls: list = []
    network.register_forward_hook(
        lambda part, args, kwargs, out: calls.append((args, kwargs, out.pred)), with_kwargs=True
    )
    module.train()
    module.training_step(rows, 0).backward()

    # Only additions are trained, and a gradient reaches those of every layer.
    trained = {name: p for name, p in module.trained.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    idle = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not idle, idle

    # Switched off it is the given network to the last bit; on again, it is what it was and still asks for gradients.
    # (PyTorch's attention takes another kernel where its weights ask for gradients: the given network's do not here.)
    args, kwargs, _ = calls[-1]
    given.requires_grad_(False)
    with torch.no_grad():
        tuned = network(*args, **kwargs).pred
        with without_adapters(network):
            before = network(*args, **kwargs).pred
        again = network(*args, **kwargs).pred
        plain = given.train()(*args, **kwargs).pred
    assert torch.equal(before, plain) and torch.equal(again, tuned) and not torch.equal(before, tuned)
    assert {name for name, p in module.trained.named_parameters() if p.requires_grad} == trained.keys()

    # The average shares what was given and follows the additions.
    old = {name: p.clone() for name, p in module.ema.module.named_parameters() if "lora_" in name}
    module.configure_optimizers().step()
    module.finish_step()
    average, decay = dict(module.ema.module.named_parameters()), module.ema.decay_at(0)
    for name, live in module.trained.named_parameters():
        if name in old:
            torch.testing.assert_close(average[name], decay * old[name] + (1 - decay) * live, rtol=1e-5, atol=1e-7)
        elif ".base_layer." in name or name.startswith("backbone."):
            assert average[name] is live
    for name, value in given.state_dict().items():
        own, (layer, _, last) = network.state_dict(), name.rpartition(".")
        assert torch.equal(own[name if name in own else f"{layer}.base_layer.{last}"], value)

    # A checkpoint has additions alone, and they are enough.
    state = module.state_dict()
    held = [name for name in state if ".backbone." in name or name.startswith("trained.backbone")]
    assert held and all("lora_" in name or name.endswith(GIVEN) for name in held)
    other = assemble(cfg).module
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    with torch.no_grad():
        expected = network.eval()(*args, **kwargs).pred
        assert torch.equal(unwrapped(other.backbone).eval()(*args, **kwargs).pred, expected)
        merged = merge(unwrapped(other.backbone))
        torch.testing.assert_close(merged.eval()(*args, **kwargs).pred, expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == given.state_dict().keys()


def test_additions_are_refused_on_other_weights(tmp_path):
    cfg, module, _ = tuned_and_given("DiT", tmp_path)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    (tmp_path / "other").mkdir()
    given = unwrapped(assemble(configuration(combination({"backbone": "DiT"}))).module.backbone)
    file = tmp_path / "other" / "given.safetensors"
    save_file({f"backbone/{name}": value + 1 for name, value in given.state_dict().items()}, file)
    cfg.tuning.weights = str(file)
    with pytest.raises(UserError, match="tuning.weights: the checkpoint holds low-rank additions to other weights"):
        assemble(cfg).module.load_state_dict(state)


def test_without_additions_there_is_no_reference():
    module = assemble(configuration(combination({"backbone": "DiT"}))).module
    with pytest.raises(UserError, match="set tuning=lora"), without_adapters(module.backbone):
        pass


def test_an_average_stays_without_gradients(tmp_path):
    _, module, _ = tuned_and_given("DiT", tmp_path)
    with without_adapters(module.ema.module["backbone"]):
        pass
    assert not any(p.requires_grad for p in module.ema.module.parameters())
    with pytest.raises(ZeroDivisionError), without_adapters(module.backbone):
        raise ZeroDivisionError  # whatever happens inside, the additions come back
    assert any(p.requires_grad for p in module.trained.parameters())
    assert not any(getattr(part, "disable_adapters", False) for part in module.trained.modules())
