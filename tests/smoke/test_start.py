"""Trainings that begin with given weights: a second stage at a larger size, low-rank additions for peft."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from callbacks.checkpoint import checkpoints_in
from repalign.backbones.clocks import unwrapped
from repalign.errors import UserError
from repalign.state import Cond
from tasks import convert
from tasks.build import assemble, load_weights
from tasks.check import check_composition
from tasks.launch import compose
from tasks.start import start_from
from tests.smoke.test_recipes_train import column, train


def composed(tmp_path, *words):
    cfg = compose([*words, "debug=tiny", f"paths.runs={tmp_path}", "run_name=run"])
    check_composition(cfg)
    return cfg


def imported(tmp_path, recipe, family, *words):
    """Weights of a tiny run of the recipe, written as the official code writes them and imported from there."""
    trained = checkpoints_in(train(tmp_path / "base", f"experiment={recipe}", *words))[-1]
    official, ours = tmp_path / "official.pt", tmp_path / "ours.safetensors"
    words = (f"experiment={recipe}", "task=convert", f"task.family={family}", *words)
    out = ("task.direction=export", f"task.input={trained}", f"task.output={official}")
    convert.run(composed(tmp_path, *words, *out))
    convert.run(composed(tmp_path, *words, f"task.input={official}", f"task.output={ours}"))
    return trained, ours


def test_layer_sync_regularises_low_rank_tuning_of_an_imported_checkpoint(tmp_path):
    peft = pytest.importorskip("peft")
    shallow = "backbone.depth=4"
    base = tmp_path / "base.safetensors"
    words = ["experiment=sit_xl", "task=convert", "task.family=sit", f"task.output={base}", shallow]
    (tmp_path / "official.pt").touch()  # a file that is asked for must be there
    cfg = composed(tmp_path, *words, f"task.input={tmp_path / 'official.pt'}")
    network = unwrapped(assemble(cfg).module.backbone)
    weights = {key: 0.1 * torch.randn_like(value) for key, value in network.state_dict().items()}
    official = convert.FAMILIES["sit"](None, cfg.task).to_official({"backbone": weights})
    torch.save({"ema": official}, cfg.task.input)
    convert.run(cfg)
    recipe = ["experiment=layer_sync_lora_sit_xl", f"tuning.weights={base}", shallow]
    recipe += ["align.layer_sync.tap=block.2", "align.layer_sync.target=block.4"]
    run_dir = train(tmp_path, *recipe, "optimizer.lr=0.05")
    terms = {name: column(run_dir, f"train/{name}")[1] for name in ("loss", "denoising", "align/layer_sync")}
    expected = terms["denoising"] + 0.002 * terms["align/layer_sync"]
    assert math.isclose(terms["loss"], expected, rel_tol=1e-5) and terms["align/layer_sync"] != 0

    # What is tuned is the imported network: its own weights have not moved, the additions have.
    plain = assemble(composed(tmp_path, "experiment=sit_xl", "task=sample", shallow)).module
    load_weights(plain, base)
    given = unwrapped(plain.backbone)
    module = assemble(composed(tmp_path, *recipe)).module
    checkpoint = checkpoints_in(run_dir)[-1]
    load_weights(module, checkpoint)
    tuned = unwrapped(module.backbone)
    for key, value in given.state_dict().items():
        for layer in ("attention.qkv.", "attention.proj."):
            key = key.replace(layer, f"{layer}base_layer.")
        assert torch.equal(tuned.state_dict()[key], value)
    assert any(value.any() for key, value in tuned.state_dict().items() if "lora_B" in key)

    # peft puts the exported additions on the imported network and predicts the same.
    folder = tmp_path / "adapter"
    words = ["task=convert", "task.family=lora", "task.direction=export", "task.weights=live"]
    convert.run(composed(tmp_path, *recipe, *words, f"task.input={checkpoint}", f"task.output={folder}"))
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(given), str(folder)).eval()
    x, t, cond = torch.randn(3, *module.latent_shape), torch.rand(3), Cond(label=torch.arange(3))
    with torch.no_grad():
        ours, theirs, before = (net.eval()(x, t, cond).pred for net in (tuned, loaded, given))
    torch.testing.assert_close(theirs, ours)
    assert (ours - before).norm() > 1e-3 * before.norm() > 0


def test_low_rank_additions_are_exported_alone(tmp_path):
    words = ["task=convert", "task.family=lora", "task.output=unused"]
    (tmp_path / "some.ckpt").touch()
    export = "task.direction=export"
    for more, message in (
        (
            ["experiment=layer_sync_lora_sit_xl", f"task.input={tmp_path / 'some.ckpt'}"],
            "exported or merged alone, found 'import'",
        ),
        (["experiment=layer_sync_lora_sit_xl", "task.input=none.ckpt", export], "no file 'none.ckpt'"),
    ):
        with pytest.raises(UserError, match=message):
            convert.run(composed(tmp_path, *more, *words))
    run = checkpoints_in(train(tmp_path, "experiment=sit_s"))[-1]
    with pytest.raises(UserError, match="set tuning=lora"):
        plain = ["experiment=sit_s", *words, "task.direction=export", f"task.input={run}"]
        convert.run(composed(tmp_path, *plain))


def test_a_larger_stage_of_ddt_begins_with_the_weights_of_the_smaller(tmp_path, capsys):
    """256 and 512 px stand for 32 and 64 here: rotary positions are in no file, the projector comes along."""
    shallow = ["backbone.depth=4", "backbone.encoder_depth=3", "align.tap=encoder.2"]
    run, converted = imported(tmp_path, "ddt_xl", "ddt", *shallow)
    words = ["experiment=ddt_xl_512", "data.image_size=64", *shallow]
    expected = torch.load(run, weights_only=True)["state_dict"]
    for file in (run, converted):
        module = assemble(composed(tmp_path, *words)).module
        grid = unwrapped(module.backbone).io.grid
        assert grid == (4, 4) and start_from(module, file) == []
        for owner, source in (("trained", "trained" if file is run else "ema.module"), ("ema.module", "ema.module")):
            for key, value in expected.items():
                if key.startswith(f"{source}."):
                    assert torch.equal(module.state_dict()[key.replace(source, owner, 1)], value), key
    capsys.readouterr()
    run_dir = train(tmp_path / "second", *words, f"init_from={converted}")
    assert f"beginning with {converted}" in capsys.readouterr().out
    assert all(math.isfinite(loss) for loss in column(run_dir, "train/loss"))
    # A run that has checkpoints goes on from them.
    train(tmp_path / "second", *words, f"init_from={converted}", "steps=3")
    shown = capsys.readouterr().out
    assert "resuming from" in shown and "beginning with" not in shown


def test_fixed_positions_of_another_grid_stay_and_missing_heads_are_told(tmp_path):
    run = checkpoints_in(train(tmp_path, "experiment=sit_s"))[-1]
    module = assemble(composed(tmp_path, "experiment=repa_sit_s", "clock=reversed", "data.image_size=64",
                               "backbone.variance_head=true")).module  # fmt: skip
    own = module.state_dict()["trained.backbone.backbone.pos_embed"].clone()
    assert start_from(module, run) == ["aligners.repa.head", "backbone.pos_embed"]
    assert torch.equal(module.state_dict()["trained.backbone.backbone.pos_embed"], own)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=ddt_xl_512", "paths.base=null"], "init_from: this recipe begins with .*REPALIGN_BASE"),
        (["experiment=layer_sync_lora_sit_xl", "paths.base=null"], "tuning.weights: this recipe begins with given"),
        (["experiment=sit_s", "init_from=absent.ckpt"], "init_from: no file 'absent.ckpt'"),
    ],
)  # fmt: skip
def test_missing_weights_are_named_before_anything_is_built(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        composed(tmp_path, *words)


def test_weights_of_another_architecture_are_named(tmp_path):
    run = checkpoints_in(train(tmp_path, "experiment=sit_s"))[-1]
    for words, message in (
        (["backbone.dim=24"], "init_from: 'backbone..* in this composition"),
        (["clock=native"], "init_from: 'backbone..*absent"),
    ):
        module = assemble(composed(tmp_path, "experiment=sit_s", *words)).module
        with pytest.raises(UserError, match=message):
            start_from(module, run)
    (tmp_path / "torn.ckpt").write_bytes(b"no weights")
    with pytest.raises(UserError, match="init_from: .* is no checkpoint of a run"):
        start_from(module, tmp_path / "torn.ckpt")
    autoencoder = assemble(composed(tmp_path, "experiment=autoencoder_openmoji")).module
    with pytest.raises(UserError, match="init_from: AutoencoderModule has no backbone"):
        start_from(autoencoder, run)
