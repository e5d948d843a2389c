"""Text to image on tiny twins: stored text, prompts, the next stage, buckets, parts that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from callbacks.checkpoint import checkpoints_in
from repalign.errors import UserError
from repalign.random import SampleRandom
from tasks import sample
from tasks.build import assemble
from tasks.check import check_composition
from tasks.launch import compose
from tasks.start import start_from
from tasks.train import run
from tests.data.test_image_text import SIZES, picture
from tests.smoke.test_recipes_train import column, train


def tiny(tmp_path: Path, *words: str):
    cfg = compose([*words, "debug=tiny", f"paths.runs={tmp_path}", "run_name=run", "callbacks.journal.every=1"])
    check_composition(cfg)
    return cfg


@pytest.mark.slow
def test_stored_text_and_text_encoded_at_each_step_give_the_same_losses(tmp_path):
    words = ["experiment=sd3_d15", "data.feature_dtype=float32", f"paths.cache={tmp_path / 'cache'}"]
    stored = column(train(tmp_path / "a", *words, "data.cache_features=true"), "train/loss")
    assert list((tmp_path / "cache").rglob("text_t5-*")) and list((tmp_path / "cache").rglob("text_clip_g-*"))
    encoded = column(train(tmp_path / "b", *words, "data.cache_features=false"), "train/loss")
    torch.testing.assert_close(torch.tensor(stored), torch.tensor(encoded), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_holds_no_text_encoder(tmp_path):
    last = torch.load(checkpoints_in(train(tmp_path, "experiment=sd3_d15"))[-1], weights_only=True)
    assert {key.split(".")[0] for key in last["state_dict"]} == {"trained", "ema"}


@pytest.mark.slow
def test_pictures_of_prompts(tmp_path):
    words = ["experiment=cross_dit_xl"]
    train(tmp_path, *words)
    drawing = ["task=sample", "task.num_samples=5", "task.write=[grid,png]", "task.batch_size=2"]
    sample.run(tiny(tmp_path, *words, *drawing, "task.prompts=[a circle,a square]"))
    folder = tmp_path / "cross_dit_xl" / "run" / "generated"
    assert json.loads((folder / "captions.json").read_text()) == ["a circle", "a square"] * 2 + ["a circle"]
    assert len(list((folder / "png").glob("*.png"))) == 5 and (folder / "grid.png").is_file()
    sample.run(tiny(tmp_path, *words, *drawing, f"task.output={tmp_path / 'data'}"))
    assert json.loads((tmp_path / "data" / "captions.json").read_text())[0] == "a circle"
    with pytest.raises(UserError, match="task.prompts: an empty list"):
        sample.run(tiny(tmp_path, *words, *drawing, "task.prompts=[]"))


def test_an_absent_encoder_is_chosen_by_one_word(tmp_path):
    cfg = compose(["experiment=sd3_d15", "text_encoder@text_encoders.t5=absent_t5"])
    assert cfg.text_encoders.t5._target_.endswith("AbsentTextEncoder") and "folder" not in cfg.text_encoders.t5
    check_root = ["data=synthetic", "experiment=sd3_d15"]
    assert compose(check_root).text_encoders.clip_g.network == "text_encoder_2"


@pytest.mark.slow
def test_the_next_stage_begins_with_the_weights_of_the_first(tmp_path):
    """256 to 1024 pixels: everything but the table of positions, which is the new one's."""
    first = checkpoints_in(train(tmp_path, "experiment=sd3_d24"))[-1]
    words = ["experiment=sd3_d24_1024", f"init_from={first}", "data.image_size=64"]
    cfg = compose(
        [*words[:1], "debug=tiny", f"paths.runs={tmp_path}", "run_name=next", "callbacks.journal.every=1", *words[1:]]
    )
    module = assemble(cfg).module
    table = module.backbone.pos_embed.clone()
    start_from(module, first)
    held = torch.load(first, weights_only=True)["state_dict"]
    own = module.state_dict()
    assert module.backbone.pos_embed.shape != held["trained.backbone.pos_embed"].shape
    assert torch.equal(module.backbone.pos_embed, table)
    others = [key for key in own if not key.endswith("pos_embed")]
    assert others and all(torch.equal(own[key], held[key]) for key in others)
    run(cfg)
    assert len(column(Path(cfg.run_dir), "train/loss")) == 2


@pytest.mark.slow
def test_heads_stay_when_a_stage_adds_or_drops_alignment(tmp_path):
    plain = checkpoints_in(train(tmp_path / "a", "experiment=repa_sd3_d24", "aligner=none", "method=generative"))[-1]
    aligned = assemble(tiny(tmp_path, "experiment=repa_sd3_d24")).module
    head = {k: x.clone() for k, x in aligned.state_dict().items() if ".aligners." in k}
    start_from(aligned, plain)
    assert head and all(torch.equal(aligned.state_dict()[k], x) for k, x in head.items())
    with pytest.raises(UserError, match="init_from: no file"):
        start_from(aligned, tmp_path / "no.ckpt")


SIZED = ["backbone.modulation.size=true", "conditioner=text_and_size", "backbone.dim=48", "backbone.heads=2"]


def test_sizes_condition_training_and_sampling(tmp_path):
    """In batches original sizes and the bucket's ratio, with latents stored; in sampling the size of the drawing."""
    words = ["experiment=cross_dit_xl", *in_buckets(tmp_path), *SIZED, "data.cache_latents=true", "data.sizes=true"]
    cfg = tiny(tmp_path, *words)
    run(cfg)
    assert all(loss == loss for loss in column(Path(cfg.run_dir), "train/loss"))
    assembly = assemble(cfg)
    data, module = assembly.data, assembly.module
    data.setup("fit")
    batch = data.dataset.__getitems__(next(iter(data.make_sampler(4, 0, 1, 1, 0, 0))))
    for index, size in zip(batch["index"].tolist(), batch["size"].tolist(), strict=True):
        (height, width), (width_of_file, height_of_file) = data.source.buckets.sides_of(index), SIZES[index]
        assert size == pytest.approx([height_of_file, width_of_file, height / width])
    seen = []
    hook = module.ema.module["backbone"].register_forward_pre_hook
    hook(lambda part, args, kwargs: seen.append(args[2] if len(args) > 2 else kwargs["cond"]), with_kwargs=True)
    module.generator().latents(["one"], SampleRandom(0, [0]))
    assert seen and all(cond.size.tolist() == [[64.0, 64.0, 1.0]] * len(cond.size) for cond in seen)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (SIZED[:1], r"conditioner: gives no sizes"),
        (SIZED[1:2], r"backbone: reads no sizes .*backbone=cross_dit_xl_size"),
        (SIZED, r"data: ImageTextDataModule gives no sizes .* data.sizes=true"),
    ],
)
def test_sizes_need_all_three(tmp_path, words, match):
    sized = [*words, *SIZED[2:]]
    with pytest.raises(UserError, match=match):
        assemble(tiny(tmp_path, "experiment=cross_dit_xl", *in_buckets(tmp_path), *dict.fromkeys(sized)))


def in_buckets(tmp_path: Path) -> list[str]:
    """A folder of small pictures of several ratios, and the words that train on it."""
    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for number, size in enumerate(SIZES):
        (root / f"{number}.png").write_bytes(picture(size, number))
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {number}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return [
        "data=image_text_folder",
        f"data.root={root}",
        "~data.size",
        "data.image_size=64",
        "data.buckets=true",
        "data.bucket_step=16",
        "data.num_workers=0",
        f"paths.cache={tmp_path / 'cache'}",
    ]


@pytest.mark.parametrize("stored", [True, False])
def test_mixed_aspect_ratios_train(tmp_path, stored):
    words = [*in_buckets(tmp_path), f"data.cache_latents={stored}", "backbone.table_side=8", "steps=6"]
    cfg = tiny(tmp_path, "experiment=sd3_d15", *words)
    run(cfg)
    losses = column(Path(cfg.run_dir), "train/loss")
    assert len(losses) == 6 and all(loss == loss for loss in losses)
    assert bool(list((tmp_path / "cache").rglob("moments.00000.npy"))) == stored


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (
            ["experiment=sd3_d15", "conditioner=label"],
            r"conditioner: LabelConditioner gives no text, which",
        ),
        (
            ["experiment=sit_s", "conditioner=text", "text_encoder=tiny"],
            r"backbone: DiT reads no text",
        ),
        (
            ["experiment=sd3_d15", "backbone=cross_dit_s"],
            r"SD3: needs an MM-DiT.* \(found CrossDiT",
        ),
        (["experiment=cross_dit_xl", "backbone=mmdit_d15"], r"CrossDiT: needs a Cross-DiT"),
        (["experiment=sd3_d15", "parametrization=noise"], r"SD3: is a rectified flow"),
        (["experiment=sd3_d15", "text_encoder=tiny"], r"conditioner: unknown text encoder 'clip_l'"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(words, match, tmp_path):
    words = [word for word in words if not word.startswith("text_encoder=")]
    words += ["text_twin=tiny"] if match.endswith("'clip_l'") or "sit_s" in words[0] else []
    with pytest.raises(UserError, match=match):
        assemble(compose([*words, "debug=tiny", f"paths.runs={tmp_path}"]))
