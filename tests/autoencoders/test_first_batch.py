import copy

import torch

from repalign.autoencoders.first_batch import FirstBatchScale


def test_the_first_training_batch_decides_and_later_ones_do_not():
    norm = FirstBatchScale().eval()
    raw = 3 * torch.randn(8, 4, 5, 5) + 1
    assert torch.equal(norm.normalize(raw), raw)  # not in training: nothing is measured
    norm.train()
    first = norm.normalize(raw)
    torch.testing.assert_close(first.std(), torch.tensor(1.0))
    torch.testing.assert_close(norm.scale, 1 / raw.std())
    torch.testing.assert_close(norm.normalize(10 * raw), 10 * first)
    torch.testing.assert_close(norm.denormalize(first), raw)


def test_the_scale_comes_back_from_a_checkpoint():
    norm = FirstBatchScale().train()
    norm.normalize(torch.randn(2, 3, 4, 4) * 5)
    other = FirstBatchScale().train()
    other.load_state_dict(copy.deepcopy(norm.state_dict()))
    raw = torch.randn(2, 3, 4, 4)
    assert torch.equal(other.normalize(raw), norm.normalize(raw))
