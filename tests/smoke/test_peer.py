"""task=benchmark task.peer=...: another code's step beside ours, on a stand-in or on checkouts at hand."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from repalign.errors import UserError
from tasks import benchmark
from tasks.check import check_composition
from tasks.launch import compose
from tasks.peer import TOLERANCE

STAND_IN = Path(__file__).parent / "stand_in"


def measured(tmp_path, *words):
    words = ["debug=tiny", "task=benchmark", "task.warmup=1", "task.steps=3", "data.keep_images=true", *words]
    cfg = compose([*words, f"paths.runs={tmp_path}", "run_name=run", f"paths.cache={tmp_path / 'cache'}"])
    check_composition(cfg)
    benchmark.run(cfg)
    (row,) = json.loads((Path(cfg.run_dir) / "benchmark.json").read_text())
    return row


def changed(tmp_path, file, old, new):
    """A copy of the stand-in with another line."""
    copy = tmp_path / "changed"
    shutil.copytree(STAND_IN, copy)
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    return copy


def test_both_codes_give_the_same_numbers_and_take_turns(tmp_path):
    row = measured(tmp_path, "experiment=repa_sit_s", f"task.peer={STAND_IN}")
    peer = row["peer"]
    assert peer["name"] == "sihyun-yu/REPA" and peer["encoder"] == "live"
    assert peer["differences"].keys() == {"output", "denoising", "align", "loss", "gradient"}
    assert max(peer["differences"].values()) <= TOLERANCE
    assert peer["ratio"]["p10"] <= peer["ratio"]["median"] <= peer["ratio"]["p90"]
    assert {"encoder", "forward", "backward", "optimizer", "ema"} <= peer["split"].keys()
    assert "peer" not in row["split"] and "encoder" not in row["split"]  # ours reads stored features
    for step in (row, peer):
        parts = sum(spread["median"] for spread in step["split"].values())
        assert parts == pytest.approx(step["seconds"]["median"], rel=0.5)
    text = next(tmp_path.rglob("benchmark.md")).read_text()
    assert "beside the official code" in text and "seconds, theirs : ours" in text


def test_stored_features_leave_the_encoder_out_of_the_other_step(tmp_path):
    words = ("experiment=repa_sit_s", "data.keep_images=false", "task.peer_encoder=stored", "task.clock=cpu")
    peer = measured(tmp_path, *words, f"task.peer={STAND_IN}")["peer"]
    assert peer["encoder"] == "stored" and peer["split"]["encoder"]["median"] < 1e-3


def test_a_checkout_is_imported_without_a_trace(tmp_path):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("models", "loss")}
    copy = changed(tmp_path, "loss.py", "mean((1, 2, 3))", "mean((-1, -2, -3))")
    measured(tmp_path, "experiment=repa_sit_s", f"task.peer={copy}")
    assert str(copy) not in sys.path
    after = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("models", "loss")}
    assert after == before
    assert sorted(p.name for p in copy.rglob("*")) == ["loss.py", "models", "sit.py"]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("loss.py", "noise - images", "images - noise", "task.peer: denoising differs from that of sihyun-yu/REPA by"),
        ("models/sit.py", "eps=1e-6", "eps=1e-2", "differs from that of sihyun-yu/REPA"),
        ("loss.py", "torch.rand((len(images), 1, 1, 1))", "torch.rand(7)", "draws torch.rand of 7 numbers where"),
        ("loss.py", "import torch\n", "import nothing_of_this_name\n", "cannot be imported .ModuleNotFoundError"),
    ],
)
def test_another_maths_or_version_is_refused(tmp_path, file, old, new, message):
    copy = changed(tmp_path, file, old, new)
    with pytest.raises(UserError, match=message):
        measured(tmp_path, "experiment=repa_sit_s", f"task.peer={copy}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=sit_s", f"task.peer={STAND_IN}"], "sihyun-yu/REPA trains with clock=native"),
        (["experiment=repa_sit_s", f"task.peer={STAND_IN.parent}"], "is no checkout of a known repository"),
        (["experiment=repa_sit_s", "task.peer=nowhere"], "no folder 'nowhere'; give the checkout of one of sihyun"),
        (["experiment=repa_sit_s", f"task.peer={STAND_IN}", "task.peer_encoder=lives"], "Did you mean 'live'"),
        (["experiment=repa_sit_s", f"task.peer={STAND_IN}", "data.keep_images=false"], "set data.keep_images=true, or"),
        (["experiment=repa_sit_s", f"task.peer={STAND_IN}", "data.accumulate=2"], "without micro-batches"),
        (["experiment=repa_sit_s", "task.clock=cpus"], "Did you mean 'cpu'"),
        (["experiment=repa_e_sit_s", f"task.peer={STAND_IN}"], "trainings of one phase"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_line(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        measured(tmp_path, *words)


@pytest.mark.parametrize(
    ("variable", "recipe", "words"),
    [
        ("REPALIGN_PEER_REPA", "repa_sit_s", []),
        ("REPALIGN_PEER_REPA", "repa_sit_s", ["path=gvp"]),
        ("REPALIGN_PEER_SIT", "sit_s", []),
        ("REPALIGN_PEER_DDT", "ddt_b", []),
    ],
)
def test_official_checkouts_that_are_at_hand(tmp_path, variable, recipe, words):
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout")
    peer = measured(tmp_path, f"experiment={recipe}", f"task.peer={os.environ[variable]}", *words)["peer"]
    assert max(peer["differences"].values()) <= TOLERANCE
