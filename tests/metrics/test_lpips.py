"""LPIPS and the scores of reconstructions."""

import copy
import math

import pytest
import torch

from repalign.errors import UserError
from repalign.metrics import lpips as module
from repalign.metrics.lpips import LPIPS, lpips_distance
from repalign.metrics.reconstruction import ReconstructionMetrics
from repalign.metrics.reference import Reference
from repalign.metrics.suite import FeatureMetrics
from tests.metrics.small import SmallNetwork


@pytest.fixture(scope="module")
def lpips():
    torch.manual_seed(0)
    return LPIPS(vgg="random", heads="random")


@pytest.fixture
def pictures():
    return torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_equal_pictures_have_distance_zero_and_the_gradient_reaches_pictures_alone(lpips, pictures):
    first, second = pictures
    assert torch.equal(lpips(first, first), torch.zeros(2))
    second = second.clone().requires_grad_()
    distance = lpips(first, second)
    assert distance.shape == (2,) and (distance > 0).all()
    distance.sum().backward()
    assert second.grad.abs().max() > 0 and all(p.grad is None for p in lpips.parameters())
    lpips.train()
    assert not lpips.training and not any(part.training for part in lpips.modules())


def test_features_are_those_behind_the_named_layers(lpips, pictures):
    found = lpips._layers(lpips.scaled(pictures[0]))
    assert [tuple(x.shape[1:]) for x in found] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]
    assert all((x >= 0).all() for x in found)
    assert all(isinstance(lpips.features[stop], torch.nn.ReLU) for stop in module.STOPS)


def test_double_scaling_is_an_option(pictures):
    plain = LPIPS(vgg="random", heads="random")
    double = LPIPS(vgg="random", heads="random", double_scaling=True)
    torch.testing.assert_close(double.scaled(pictures[0]), plain.scaled(2 * pictures[0] - 1))


def test_float64_weights_see_float64_pictures(lpips, pictures):
    """Else a gradient in float64 would carry the rounding of float32, which depends on the size of the batch."""
    wide, (first, second) = copy.deepcopy(lpips).double(), pictures.double()
    second.requires_grad_()
    wide(first, second).sum().backward()
    gradient = second.grad.clone()
    moved = 1e-11 * gradient.sign()
    rise = (wide(first, second + moved) - wide(first, second)).sum().detach()
    assert float(rise) == pytest.approx(float((moved * gradient).sum()), rel=1e-3)


def test_features_count_by_direction():
    a, b = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1), torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    found = lpips_distance([a], [b], [torch.tensor([1.0, 2.0])])
    assert found.item() == pytest.approx((0.6 - 1) ** 2 + 2 * 0.8**2)
    assert lpips_distance([a], [7 * a], [torch.ones(2)]).item() == pytest.approx(0.0, abs=1e-6)


def test_heads_come_from_torchmetrics_and_vgg_from_a_file(tmp_path, lpips, pictures):
    file = tmp_path / "vgg16.pth"
    torch.save(
        {f"features.{k}": v for k, v in lpips.features.state_dict().items()} | {"classifier.0.bias": torch.ones(1)},
        file,
    )
    loaded = LPIPS(vgg=file)
    assert all((head >= 0).all() for head in loaded.heads)
    calibrated = loaded(*pictures)
    assert calibrated.isfinite().all() and not torch.allclose(calibrated, lpips(*pictures))


def test_missing_and_foreign_files_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"paths\.vgg16: no file '.*vgg16-397923af\.pth'.*REPALIGN_VGG16"):
        LPIPS()
    with pytest.raises(UserError, match=r"paths\.lpips: no file '/no/heads.pth'.*REPALIGN_LPIPS"):
        LPIPS(vgg="random", heads="/no/heads.pth")
    foreign = tmp_path / "foreign.pth"
    torch.save({"features.0.weight": torch.ones(3)}, foreign)
    with pytest.raises(UserError, match=r"paths\.vgg16: .* is another file: 'features\.0\.weight' is \[3\]"):
        LPIPS(vgg=foreign)
    foreign.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"paths\.lpips: '.*foreign.pth' cannot be read"):
        LPIPS(vgg="random", heads=foreign)


def test_scores_of_reconstructions():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8
    features = FeatureMetrics(SmallNetwork(), {})
    features.set_reference(Reference.measure(features._features, [images], "x"))
    metrics = ReconstructionMetrics(lambda a, b: (a - b).abs().flatten(1).mean(1), features)
    metrics.update(images[:4], images[:4] + 0.1)
    metrics.update(images[4:], images[4:] + 0.1)
    found = metrics.compute()
    assert found["psnr"] == pytest.approx(20.0, abs=1e-4)
    assert found["l1"] == pytest.approx(0.1, abs=1e-6) and found["lpips"] == pytest.approx(0.2, abs=1e-6)
    assert 0 < found["ssim"] < 1
    assert features.count == 6
    metrics.reset()
    metrics.update(images, images)
    same = metrics.compute()
    assert same["psnr"] == 100 and same["ssim"] == pytest.approx(1.0) and math.isclose(same["l1"], 0.0)
    metrics.reset()
    with pytest.raises(ValueError, match="no picture"):
        metrics.compute()
