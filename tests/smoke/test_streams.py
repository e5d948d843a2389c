"""REG and ReDi end to end on tiny twins: components, caches, drawing, conversion, contracts."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from callbacks.checkpoint import checkpoints_in
from repalign.encoders.pca import read_pca
from repalign.errors import UserError
from tasks import convert, fit_pca, sample
from tasks.build import assemble, load_weights
from tasks.check import check_composition
from tasks.launch import compose
from tests.smoke.test_recipes_train import column, train


def composed(tmp_path: Path, *words: str):
    cfg = compose([*words, "debug=tiny", f"paths.runs={tmp_path}", "run_name=run"])
    check_composition(cfg)
    return cfg


@pytest.fixture
def components(tmp_path):
    """What task=fit_pca writes for the tiny encoder."""
    file = tmp_path / "pca.safetensors"
    words = ["experiment=redi_sit_b", "task=fit_pca", f"task.output={file}", "task.pictures=50", "task.batch_size=16"]
    fit_pca.run(composed(tmp_path, *words))
    return file


def test_components_are_fitted_written_and_trained_on(components, tmp_path, capsys):
    pca = read_pca(components)
    assert pca.components.shape == (24, 24)
    assert pca.provenance["pictures"] == "50" and pca.provenance["tokens"] == "200"
    run_dir = train(tmp_path, "experiment=redi_sit_b", "pca=file", f"pca.path={components}")
    assert all(math.isfinite(loss) for loss in column(run_dir, "train/denoising/features"))


def test_components_of_another_encoder_are_refused(components, tmp_path):
    words = ["experiment=redi_sit_b", "pca=file", f"pca.path={components}", "encoders.main.card=dinov2_b_reg"]
    with pytest.raises(UserError, match="pca.path: components were fitted on encoder dinov2_s.*task=fit_pca"):
        assemble(composed(tmp_path, *words))


def test_the_choice_of_pictures_depends_on_the_seed_alone(tmp_path):
    cfg = composed(tmp_path, "experiment=redi_sit_b", "task=fit_pca", "task.output=unused")
    one, two, other = (
        fit_pca.fit_pca(
            fit_pca.build(cfg.data, "data"),
            fit_pca.build(cfg.encoders.main, "encoders.main"),
            pictures=30,
            batch_size=batch,
            seed=seed,
        )
        for batch, seed in ((7, 0), (30, 0), (30, 1))
    )
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one.mean, other.mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["reg_sit_b", "redi_repa_sit_xl"])
def test_cached_and_computed_features_train_alike(recipe, tmp_path):
    cached = train(
        tmp_path / "a", f"experiment={recipe}", "data.feature_dtype=float32", f"paths.cache={tmp_path / 'cache'}"
    )
    computed = train(tmp_path / "b", f"experiment={recipe}", "data.cache_features=false")
    for name in ("train/loss", "train/align/repa"):
        torch.testing.assert_close(
            torch.tensor(column(cached, name)), torch.tensor(column(computed, name)), rtol=1e-4, atol=1e-5
        )


def test_the_total_is_the_weighted_sum_of_streams_and_alignment(tmp_path):
    run_dir = train(tmp_path, "experiment=reg_sit_b")
    terms = [column(run_dir, f"train/{n}") for n in ("denoising/latent", "denoising/class_token", "align/repa", "loss")]
    for latent, token, aligned, loss in zip(*terms, strict=True):
        assert math.isclose(loss, latent + token + 0.5 * aligned, rel_tol=1e-4)
    # An untrained network predicts 0: the mean square of the target is weighted by 0.03.
    assert terms[1][0] < 0.2 < terms[0][0]


def test_separate_tokens_train_and_align(tmp_path):
    run_dir = train(tmp_path, "experiment=redi_repa_sit_xl", "token_io=separate")
    assert all(math.isfinite(loss) for loss in column(run_dir, "train/align/repa"))


@pytest.mark.parametrize(
    ("recipe", "guidance"),
    [
        ("reg_sit_b", "cfg_with_class_token"),
        ("redi_sit_b", "cfg_latent_only"),
        ("redi_rg_dit_b", "representation"),
    ],
)
def test_pictures_are_drawn_under_each_guidance(recipe, guidance, tmp_path):
    train(tmp_path, f"experiment={recipe}")
    words = [f"experiment={recipe}", f"guidance={guidance}", "task=sample", "task.num_samples=4", "task.write=[png]"]
    cfg = composed(tmp_path, *words)
    sample.run(cfg)
    pictures = sorted(Path(cfg.task.output).rglob("*.png"))
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize(("recipe", "family"), [("reg_sit_b", "reg"), ("redi_repa_sit_xl", "redi")])
def test_weights_survive_the_way_to_the_official_format_and_back(recipe, family, tmp_path):
    trained = checkpoints_in(train(tmp_path, f"experiment={recipe}"))[-1]
    official, back = tmp_path / "official.pt", tmp_path / "back.safetensors"
    words = [f"experiment={recipe}", "task=convert", f"task.family={family}"]
    convert.run(composed(tmp_path, *words, "task.direction=export", f"task.input={trained}", f"task.output={official}"))
    convert.run(composed(tmp_path, *words, f"task.input={official}", f"task.output={back}"))
    found = []
    for file in (trained, back):
        module = assemble(composed(tmp_path, f"experiment={recipe}")).module
        load_weights(module, file)
        found.append(module.ema.module.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=reg_sit_b", "streams=none", "token_io=patch"], "REG: diffuses a class token"),
        (["experiment=reg_sit_b", "encoders.main.class_token=false"], "encoders.main.class_token=true"),
        (["experiment=reg_sit_b", "aligner=none"], "REG: needs an aligner"),
        (["experiment=reg_sit_b", "token_io=patch"], "token_io: patches take one stream"),
        (["experiment=reg_sit_b", "+encoder@encoders.second=tiny", "+aligner@aligners.second=repa",
          "aligners.second.target.encoder=second"], "REG: aligns the class token too"),
        (["experiment=redi_sit_b", "streams=none", "token_io=patch"], "ReDi: diffuses features"),
        (["experiment=redi_sit_b", "guidance=representation"], "ReDi: .*objective=streams_with_dropout"),
        (["experiment=redi_sit_b", "encoder=none"], "streams.encoder: unknown encoder"),
        (["experiment=redi_sit_b", "pca=file", "pca.path=null"], "pca.path: has no value"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named_in_one_line(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        assemble(composed(tmp_path, *words))
