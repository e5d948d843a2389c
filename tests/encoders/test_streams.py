"""Streams beside the latent: class tokens, principal components, and the file of the latter."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from repalign.encoders.pca import PCA, PCAFit, random_pca, read_pca
from repalign.encoders.streams import ClassToken, PCAFeatures, state_shape
from repalign.errors import UserError
from repalign.state import Tokens, TokenSpec

LATENT = (4, 8, 8)


def tokens(count=300, dim=6):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator)
    return 3 + torch.randn(count, dim, generator=generator) @ mixing


def fitted(components=None, provenance=None) -> PCA:
    fit = PCAFit(6)
    for part in tokens().split(77):
        fit.update(part)
    return fit.finish(components, provenance)


def test_components_are_those_of_a_singular_value_decomposition():
    pca, x = fitted(), tokens().double().numpy()
    standard = (x - x.mean(0)) / x.std(0)
    _, values, rows = np.linalg.svd(standard, full_matrices=False)
    np.testing.assert_allclose(pca.variance, values**2 / (len(x) - 1), rtol=1e-5)
    np.testing.assert_allclose(np.abs(pca.components.numpy() @ rows.T), np.eye(6), atol=1e-4)
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(6), rtol=0, atol=1e-5)


def test_scores_are_centred_uncorrelated_and_not_whitened():
    pca = fitted()
    scores = pca(tokens(), rank=4)
    torch.testing.assert_close(scores.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.T.cov(), pca.variance[:4].diag(), rtol=1e-3, atol=1e-3)


def test_scores_are_float32_under_autocast():
    pca, x = fitted(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        scores = pca(x, rank=4)
    assert torch.equal(scores, pca(x, rank=4))


def test_every_component_together_loses_nothing():
    pca, x = fitted(), tokens()
    back = (pca(x, rank=6) @ pca.components + pca.center) * pca.std + pca.mean
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


def test_a_file_survives_and_says_what_it_was_made_from(tmp_path):
    pca, file = fitted(4, {"encoder": "dinov2", "tokens": "300"}), tmp_path / "pca.safetensors"
    pca.save(file)
    back = read_pca(file)
    assert back.provenance == {"encoder": "dinov2", "tokens": "300"} and back.fingerprint == pca.fingerprint
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in pca.state_dict().items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["fingerprint"] == pca.fingerprint


def test_files_that_will_not_do_are_named(tmp_path):
    file = tmp_path / "pca.safetensors"
    fitted().save(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    changed = {**load_file(file), "mean": torch.zeros(6)}
    for held, facts, words in (
        (changed, metadata, "other numbers than were written"),
        ({"mean": torch.zeros(6)}, metadata, "no file of this project's components"),
        (changed, {}, "no file of this project's components"),
    ):
        save_file(held, file, facts)
        with pytest.raises(UserError, match=f"pca.path: .*{words}.*task=fit_pca"):
            read_pca(file)
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        read_pca(file)
    with pytest.raises(UserError, match="pca.path: no file"):
        read_pca(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="pca.path: has no value.*REPALIGN_PCA"):
        read_pca(None)


def test_tokens_that_fix_no_components_are_refused():
    few = PCAFit(6)
    few.update(tokens(6))
    with pytest.raises(UserError, match="task.pictures: 6 tokens do not fix 6 components"):
        few.finish()
    flat = PCAFit(6)
    flat.update(torch.cat([tokens()[:, :5], torch.zeros(300, 1)], 1))
    with pytest.raises(UserError, match="dimension 5 of the tokens never changes"):
        flat.finish()
    with pytest.raises(UserError, match="task.components: expected 1 to 6"):
        fitted(7)


def test_the_class_token_is_the_encoder_s_own():
    spec, data = TokenSpec(6, (2, 2), prefix=1), torch.randn(3, 5, 6)
    source = ClassToken(features={"main": spec}, latent_shape=LATENT)
    assert source.shape == (6,) and torch.equal(source(Tokens(data, (2, 2), 1)), data[:, 0])
    with pytest.raises(UserError, match="encoders.main.class_token=true"):
        ClassToken(features={"main": TokenSpec(6, (2, 2))}, latent_shape=LATENT)
    with pytest.raises(UserError, match="unknown encoder.*'other'"):
        ClassToken("other", features={"main": spec}, latent_shape=LATENT)


def test_features_are_a_map_of_the_latent_s_size_without_the_class_token():
    pca, data = fitted(), torch.randn(3, 17, 6)
    source = PCAFeatures(2, pca, features={"main": TokenSpec(6, (4, 4), 1)}, latent_shape=LATENT)
    found = source(Tokens(data, (4, 4), 1))
    assert found.shape == (3, *source.shape) == (3, 2, 8, 8)
    same = PCAFeatures(2, pca, features={"main": TokenSpec(6, (4, 4))}, latent_shape=(4, 4, 4))
    scores = pca(data[:, 1:], 2).transpose(1, 2).reshape(3, 2, 4, 4)
    torch.testing.assert_close(same(Tokens(data[:, 1:], (4, 4))), scores)
    assert state_shape(LATENT, {"features": source}) == {"latent": LATENT, "features": (2, 8, 8)}
    assert state_shape(LATENT, {}) == LATENT
    with pytest.raises(UserError, match="streams.latent"):
        state_shape(LATENT, {"latent": source})


def test_components_of_another_encoder_or_too_few_of_them():
    for spec, rank, words in (
        (TokenSpec(7, (4, 4)), 2, "pca.path: components of width 6, but encoder 'main' has 7"),
        (TokenSpec(6, (4, 4)), 9, "rank: expected 1 to 6"),
        (TokenSpec(6), 2, "are no grid"),
    ):
        with pytest.raises(UserError, match=words):
            PCAFeatures(rank, fitted(), features={"main": spec}, latent_shape=LATENT)


def test_random_components_are_the_same_each_time():
    one, two = random_pca(6), random_pca(6)
    assert one.fingerprint == two.fingerprint
    torch.testing.assert_close(one.components @ one.components.T, torch.eye(6), rtol=0, atol=1e-5)
