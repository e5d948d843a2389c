"""Running statistics of latents: PyTorch's batch normalisation, over one process or several."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from repalign.autoencoders.latent_norm import ScaleShift, Statistics
from repalign.autoencoders.running_norm import RunningStatistics
from repalign.errors import UserError
from repalign.training.ema import EMA

MEAN, STD = [0.5, -2.0, 3.0], [0.5, 2.0, 4.0]


@pytest.fixture
def raw():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 4, 5, generator=generator) * torch.tensor([1.0, 3.0, 0.2]).reshape(3, 1, 1) + 0.7


def twin(momentum=0.1):
    """PyTorch's module with the same start."""
    reference = nn.BatchNorm2d(3, eps=1e-4, momentum=momentum, affine=False)
    reference.running_mean.copy_(torch.tensor(MEAN))
    reference.running_var.copy_(torch.tensor(STD) ** 2)
    return reference


def running(**options):
    return RunningStatistics(3, initial=Statistics(MEAN, STD), **options)


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_equals_batch_norm_with_gradient_and_buffers(raw, momentum):
    ours, reference = running(momentum=momentum), twin(momentum)
    for training in (True, True, False):
        ours.train(training)
        reference.train(training)
        leaves = [raw.clone().requires_grad_() for _ in range(2)]
        results = [ours.normalize(leaves[0]), reference(leaves[1])]
        torch.testing.assert_close(*results)
        for result in results:
            (result**3).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
    assert ours.state_dict().keys() == reference.state_dict().keys()
    reference.load_state_dict(ours.state_dict())


def test_decoding_undoes_the_running_statistics_with_or_without_eps(raw):
    official, exact = running().eval(), running(eps_at_decode=True).eval()
    latent = official.normalize(raw)
    torch.testing.assert_close(exact.denormalize(latent), raw)
    shrunk = (torch.tensor(STD) ** 2 / (torch.tensor(STD) ** 2 + 1e-4)).sqrt().reshape(3, 1, 1)
    mean = torch.tensor(MEAN).reshape(3, 1, 1)
    torch.testing.assert_close(official.denormalize(latent), (raw - mean) * shrunk + mean)
    torch.testing.assert_close(official.scale.flatten(), 1 / torch.tensor(STD))
    # Also in training mode, and without moving the statistics.
    torch.testing.assert_close(official.train().denormalize(latent), official.eval().denormalize(latent))
    assert official.num_batches_tracked == 0


def test_begins_at_any_fixed_norm_or_at_mean_0_and_variance_1():
    one = RunningStatistics(4, initial=ScaleShift(0.5, 0.25))
    assert one.running_mean.tolist() == [0.25] * 4 and one.running_var.tolist() == [4.0] * 4
    none = RunningStatistics(2)
    assert none.running_mean.tolist() == [0.0] * 2 and none.running_var.tolist() == [1.0] * 2


def test_the_average_of_weights_covers_the_buffers(raw):
    live = running().train()
    average = EMA(live, decay=0.5)
    live.normalize(raw)
    average.update(live, 0)
    expected = (torch.tensor(MEAN) + live.running_mean) / 2
    torch.testing.assert_close(average.module.running_mean, expected)
    assert average.module.num_batches_tracked == 1
    with torch.no_grad():
        torch.testing.assert_close(
            average.module.normalize(raw),
            (raw - expected.reshape(3, 1, 1)) * (average.module.running_var.reshape(3, 1, 1) + 1e-4).rsqrt(),
        )


def test_buffers_stay_in_single_precision(raw):
    norm = running().to(torch.bfloat16)
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert norm.running_var.tolist() == [0.25, 4.0, 16.0]
    assert norm.normalize(raw.bfloat16()).dtype == torch.float32


def test_errors_name_the_key():
    with pytest.raises(UserError, match=r"autoencoder\.norm\.initial: statistics of 3 channels for a latent of 4"):
        RunningStatistics(4, initial=Statistics(MEAN, STD))
    with pytest.raises(UserError, match=r"autoencoder\.norm\.momentum: .* found 0"):
        RunningStatistics(3, momentum=0)
    with pytest.raises(UserError, match=r"autoencoder\.norm\.eps: .* found 0"):
        RunningStatistics(3, eps=0)


def rank(number, folder, raw):
    """One of two processes with unequal shares of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    share = (raw[:4], raw[4:])[number].clone().requires_grad_()
    norm = running().train()
    latent = norm.normalize(share)
    weight = torch.arange(raw.numel()).reshape(raw.shape).cos()
    ((latent**3) * (weight[:4], weight[4:])[number]).sum().backward()
    torch.save((latent.detach(), share.grad, norm.state_dict()), folder / f"{number}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(raw, tmp_path):
    torch.multiprocessing.spawn(rank, (tmp_path, raw), nprocs=2)
    parts = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2)]
    whole, norm = raw.clone().requires_grad_(), running().train()
    latent = norm.normalize(whole)
    ((latent**3) * torch.arange(raw.numel()).reshape(raw.shape).cos()).sum().backward()
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), latent)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole.grad)
    for _, _, state in parts:
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(state[name], value)
