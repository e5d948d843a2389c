"""Linear probes, centred kernel alignment, hidden states of a backbone, and their principal components."""

import pytest
import torch

from repalign.backbones.deepflow import DeepFlow
from repalign.conditioners.label import LabelConditioner
from repalign.errors import UserError
from repalign.metrics.alignment import cka, cknna
from repalign.metrics.linear_probe import probe_accuracy
from repalign.paths.linear import LinearPath
from repalign.state import Tokens
from repalign.training.tap_features import pooled_taps, principal_colours, tap_tokens


def clusters(count, seed, classes=4, dim=12, spread=0.4):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_classes_that_can_be_read_are_read(head):
    train, test = clusters(200, 1), clusters(80, 2)
    state = torch.get_rng_state()
    found = probe_accuracy(*train, *test, 4, head)
    assert found > 0.95 and torch.equal(torch.get_rng_state(), state)
    assert probe_accuracy(*train, *test, 4, head) == found
    # Scale and offset of a column change nothing.
    scale, offset = torch.logspace(-3, 3, 12), torch.linspace(-5, 5, 12)
    moved = probe_accuracy(train[0] * scale + offset, train[1], test[0] * scale + offset, test[1], 4, head)
    assert moved == pytest.approx(found, abs=0.02)


def test_noise_has_no_classes_and_only_layers_read_a_ring():
    train, test = clusters(400, 1, spread=50.0), clusters(200, 2, spread=50.0)
    assert probe_accuracy(*train, *test, 4) < 0.4
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(600, 2, generator=generator)
    inside = (points.norm(dim=1) < 1.18).long()
    halves = points[:400], inside[:400], points[400:], inside[400:]
    assert probe_accuracy(*halves, 2, "linear") < 0.65 < 0.9 < probe_accuracy(*halves, 2, "mlp")


def test_probe_messages():
    rows = clusters(8, 1)
    with pytest.raises(UserError, match="task.head: unknown choice 'linar'. Did you mean 'linear'"):
        probe_accuracy(*rows, *rows, 4, "linar")
    with pytest.raises(UserError, match="8 pictures to train on and 0 to test on"):
        probe_accuracy(*rows, rows[0][:0], rows[1][:0], 4)


def test_cka_is_the_formula_and_forgets_rotations():
    x, _ = clusters(50, 1)
    y, _ = clusters(50, 2, dim=7)
    a, b = (z.double() - z.double().mean(0) for z in (x, y))
    k, l = a @ a.T, b @ b.T
    assert cka(x, y) == pytest.approx(float((k * l).sum() / (k.norm() * l.norm())), rel=1e-9)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(3)))
    assert cka(x, 3 * x @ rotation + 1) == pytest.approx(1.0, abs=1e-6) and 0 < cka(x, y) < 1
    with pytest.raises(UserError, match="50 and 49 pictures"):
        cka(x, y[:49])


def test_cka_against_all_neighbours_of_cknna():
    """With every other picture as neighbour, CKNNA is an alignment over the same kernels, rows of unit length."""
    x, y = (torch.nn.functional.normalize(clusters(60, seed)[0]) for seed in (1, 2))
    assert cknna(x, y, 59) == pytest.approx(cka(x, y), abs=0.05)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    backbone = DeepFlow((3, 8, 8), 4, 4, 16, 2, 2, branches=2, acceleration_hidden=8).eval()
    return {"backbone": backbone, "path": LinearPath(), "conditioner": LabelConditioner(4)}


def test_hidden_states_do_not_depend_on_the_batch(parts):
    x_0 = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    serials = list(range(20, 30))
    whole, cut = (
        pooled_taps(tap_tokens(["block.1", "block.2"], x_0, serials, 0.4, batch_size=size, **parts)) for size in (10, 3)
    )
    assert whole.keys() == {"block.1", "block.2"} and whole["block.1"].shape == (10, 16)
    for tap in whole:
        torch.testing.assert_close(whole[tap], cut[tap], rtol=1e-5, atol=1e-6)
    other = pooled_taps(tap_tokens(["block.1"], x_0, serials, 0.4, seed=1, **parts))
    assert not torch.allclose(other["block.1"], whole["block.1"])


def test_principal_colours_follow_the_tokens():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 20, generator=generator)
    weights = torch.rand(2, 12, 3, generator=generator) * torch.tensor([9.0, 3.0, 1.0])
    colours = principal_colours(Tokens(weights @ directions, (3, 4)), share=0.0)
    assert colours.shape == (2, 3, 3, 4) and colours.min() == 0 and colours.max() == 1
    red = colours[:, 0].flatten()
    assert abs(torch.corrcoef(torch.stack([red, weights[..., 0].flatten()]))[0, 1]) > 0.9
