"""Doors of SRA, LayerSync and U-REPA: their contracts, compositions, and what they train."""

import math

import pytest

from repalign.errors import UserError
from tasks.build import assemble
from tasks.launch import compose
from tests.smoke.test_recipes_train import column, train


def module(tmp_path, *words):
    return assemble(compose([*words, "debug=tiny", f"paths.runs={tmp_path}"])).module


@pytest.fixture(autouse=True)
def data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=sra_sit_b", "aligner=none"], "SRA: needs an aligner with a teacher; set aligner=sra"),
        (["experiment=layer_sync_sit_b", "aligner=none"], "LayerSync: needs an aligner with a layer as target"),
        (
            ["experiment=layer_sync_sit_b", "align.layer_sync.target=block.4"],
            "aligners.layer_sync: tap and target are both 'block.4'",
        ),
        (["experiment=u_repa_sit_b", "aligner=repa", "align.tap=encoder.1"], "URepa: needs an aligner with an encoder"),
        (
            ["experiment=u_repa_sit_b", "aligner=repa", "align.tap=mid", "aligners.repa.resize=student"],
            "URepa: needs a manifold loss",
        ),
        (
            [
                "experiment=sra_dts_sit_b",
                "backbone=sit_down_b_2",
                "align.sra.tap=encoder.1",
                "align.sra.target=encoder.3",
            ],
            "objective and backbone do not go together: DualTimestep .* SiTDown takes one time a sample",
        ),
    ],
)
def test_contracts_say_what_is_missing(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        module(tmp_path, *words)


def test_aligners_add_up(tmp_path):
    run_dir = train(tmp_path, "experiment=repa_sit_b", "aligner=[repa,layer_sync]")
    terms = {n: column(run_dir, f"train/{n}")[0] for n in ("loss", "denoising", "align/repa", "align/layer_sync")}
    expected = terms["denoising"] + 0.5 * terms["align/repa"] + 0.2 * terms["align/layer_sync"]
    assert math.isclose(terms["loss"], expected, rel_tol=1e-5)


def test_a_second_pair_is_two_words(tmp_path):
    second = [
        "+aligner@aligners.second=layer_sync",
        "aligners.second.tap=block.5",
        "aligners.second.target.tap=block.9",
    ]
    run_dir = train(tmp_path, "experiment=layer_sync_sit_b", *second)
    assert column(run_dir, "train/align/second") and column(run_dir, "train/align/layer_sync")


def test_the_weight_of_sra_falls_with_the_step(tmp_path):
    """Two steps of an epoch each: after the first the weight is a tenth."""
    late = ["align.sra.epoch=1", "align.sra.hold=0", "align.sra.tenfold=1"]
    run_dir = train(tmp_path, "experiment=sra_sit_b", *late)
    for step, weight in enumerate((0.2, 0.02)):
        terms = {n: column(run_dir, f"train/{n}")[step] for n in ("loss", "denoising", "align/sra")}
        assert math.isclose(terms["loss"], terms["denoising"] + weight * terms["align/sra"], rel_tol=1e-5)


def test_low_rank_tuning_trains(tmp_path):
    tuning = ["tuning=lora", "tuning.weights=random", "aligners.layer_sync.target.detach=false"]
    run_dir = train(tmp_path, "experiment=layer_sync_sit_b", *tuning)
    assert all(math.isfinite(x) for x in column(run_dir, "train/loss"))
