"""Low-rank tuning of a backbone, where peft is installed; and what is said where it is not."""

import copy
import sys

import pytest
import torch
from safetensors.torch import save_file

from repalign.backbones.dit import DiT
from repalign.backbones.tuning import full, lora
from repalign.errors import UserError
from repalign.state import Cond

OPTIONS = {"weights": "random", "rank": 2, "alpha": 2, "layers": ["attention.qkv", "attention.proj"]}


def backbone() -> DiT:
    torch.manual_seed(0)
    net = DiT((4, 8, 8), num_classes=10, patch=2, dim=16, depth=2, heads=2)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def predict(net: DiT) -> torch.Tensor:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return net(x, torch.tensor([0.1, 0.5, 0.9]), Cond(label=torch.arange(3))).pred


def test_full_tuning_changes_nothing():
    net = backbone()
    assert full(net) is net
    assert all(p.requires_grad for p in net.parameters())


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs the package peft; .*repalign\[lora\]"):
        lora(backbone(), **OPTIONS)


def test_additions_begin_at_zero_and_alone_are_trained():
    net = backbone()
    expected = predict(net)
    tuned = lora(net, **OPTIONS)
    assert torch.equal(predict(tuned), expected)
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2  # blocks x layers x (A, B)
    assert all("lora_" in name for name in trained)
    predict(tuned).square().sum().backward()
    assert all(p.grad is None for name, p in tuned.named_parameters() if name not in trained)
    copy.deepcopy(tuned).load_state_dict(tuned.state_dict())


def test_given_weights_are_loaded_first(tmp_path):
    given = backbone()
    file = tmp_path / "weights.safetensors"
    save_file({f"backbone/{key}": value.contiguous() for key, value in given.state_dict().items()}, file)
    fresh = DiT((4, 8, 8), num_classes=10, patch=2, dim=16, depth=2, heads=2)
    assert torch.equal(predict(lora(fresh, **{**OPTIONS, "weights": file})), predict(given))


@pytest.mark.parametrize(
    ("dim", "layers", "name", "message"),
    [
        (
            16,
            ["attention.qkw"],
            "weights.safetensors",
            "tuning.layers: .*'attention.qkw'. Did you mean 'attention.qkv'",
        ),
        (32, ["attention.qkv"], "weights.safetensors", "tuning.weights: .* another architecture"),
        (16, ["attention.qkv"], "absent.safetensors", "tuning.weights: no file"),
    ],
)
def test_mistakes_are_named(tmp_path, dim, layers, name, message):
    state = {f"backbone/{key}": value.contiguous() for key, value in backbone().state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    net = DiT((4, 8, 8), num_classes=10, patch=2, dim=dim, depth=2, heads=2)
    with pytest.raises(UserError, match=message):
        lora(net, weights=tmp_path / name, rank=2, alpha=2, layers=layers)
