import pytest
import torch

from repalign.aligners.manifold import BatchManifold, IntraManifold, PooledManifold

SCOPES = [IntraManifold(), PooledManifold(), BatchManifold()]


@pytest.mark.parametrize("manifold", SCOPES)
def test_only_relations_count(manifold):
    """Rotating and scaling the student changes no cosine between its tokens."""
    x = torch.randn(3, 8, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    torch.testing.assert_close(manifold(5 * x @ rotation, x), torch.zeros(3), atol=1e-6, rtol=0)
    assert manifold(torch.randn(3, 8, 6), x).mean() > 0


def test_the_mean_over_the_batch_is_that_over_all_pairs():
    x, y = torch.randn(3, 8, 6), torch.randn(3, 8, 6)

    def cosines(rows):
        unit = torch.nn.functional.normalize(rows, dim=-1)
        return unit @ unit.T

    flat = (cosines(x.reshape(24, 6)) - cosines(y.reshape(24, 6))).square().mean()
    torch.testing.assert_close(BatchManifold()(x, y).mean(), flat)
    per_sample = torch.stack([(cosines(a) - cosines(b)).square().mean() for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(IntraManifold()(x, y), per_sample)


def test_relations_within_a_sample_do_not_depend_on_the_batch():
    x, y = torch.randn(3, 8, 6), torch.randn(3, 8, 6)
    torch.testing.assert_close(IntraManifold()(x, y)[1:2], IntraManifold()(x[1:2], y[1:2]))


@pytest.mark.parametrize("manifold", SCOPES)
def test_float32_under_autocast(manifold):
    x, y = torch.randn(3, 8, 6), torch.randn(3, 8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = manifold(x, y)
    assert torch.equal(loss, manifold(x, y))
