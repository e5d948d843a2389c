"""Filling in: by a network trained for it, by any other; large latents crop by crop."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from repalign.errors import UserError
from tasks import inpaint, sample
from tasks.launch import compose
from tests.smoke.test_recipes_train import train

DRAW = ("debug=tiny", "run_name=run")


def filled(tmp_path, recipe, *words):
    cfg = compose(["task=inpaint", f"experiment={recipe}", *DRAW, f"paths.runs={tmp_path}", *words])
    inpaint.run(cfg)
    return tmp_path / recipe / "run" / "inpainted"


@pytest.mark.parametrize(
    ("recipe", "sampler"), [("ldm_inpaint", "ldm_ddim"), ("ldm_f4", "ldm_ddim"), ("ldm_f4", "plms")]
)
def test_the_known_part_is_the_pictures_own(recipe, sampler, tmp_path):
    train(tmp_path, f"experiment={recipe}")
    folder, masks = tmp_path / "pictures", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    missing = np.zeros((32, 32), dtype=np.uint8)
    missing[8:24, 4:20] = 255
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(missing).save(masks / "a.png")
    other = ("~sampler.eta",) if sampler == "plms" else ()
    words = (f"sampler={sampler}", *other, f"task.pictures={folder}", f"task.masks={masks}", "task.columns=2")
    output = filled(tmp_path, recipe, *words)
    first, second = (np.asarray(Image.open(output / "png" / f"000000_{n}.png")) for n in (0, 1))
    known = missing == 0
    assert (first[known] == picture[known]).all() and (second[known] == picture[known]).all()
    assert (first[~known] != second[~known]).any() and (first[~known] != picture[~known]).any()
    assert json.loads((output / "settings.json").read_text())["paste"] is True
    again = filled(tmp_path, recipe, *words, "task.batch_size=1", f"task.output={tmp_path / 'again'}")
    assert (np.asarray(Image.open(again.parent.parent.parent / "again" / "png" / "000000_1.png")) == second).all()
    free = tmp_path / "free"
    filled(tmp_path, recipe, *words, "task.paste=false", f"task.output={free}")
    assert (np.asarray(Image.open(free / "png" / "000000_0.png"))[known] != picture[known]).any()


def test_pictures_of_the_data_and_mistakes(tmp_path):
    train(tmp_path, "experiment=ldm_f4")
    output = filled(tmp_path, "ldm_f4", "sampler=ldm_ddim", "task.num_samples=2", "task.columns=1")
    assert len(list((output / "png").iterdir())) == 2 and (output / "grid.png").is_file()
    for words, message in (
        (("sampler=dpm_solver", "~sampler.eta"), "sampler: .* cannot be held to the known part of a picture"),
        ((f"task.pictures={tmp_path / 'none'}",), "task.pictures: no picture in"),
        ((f"task.masks={tmp_path}",), "task.masks: masks go with a folder of pictures"),
        (("task.classes=99",), "task.classes: found 99, valid: 0 to 3"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            filled(tmp_path, "ldm_f4", *words)


def test_a_latent_in_crops(tmp_path):
    train(tmp_path, "experiment=ldm_f4", "optimizer.lr=0.1", "steps=4", "ema.decay=0.0")  # away from its zero output

    def drawn(name, *words):
        task = (
            "task=sample",
            "task.num_samples=4",
            "task.write=[png]",
            "task.keep=null",
            f"task.output={tmp_path / name}",
        )
        sample.run(compose([*task, "experiment=ldm_f4", *DRAW, f"paths.runs={tmp_path}", *words]))
        return np.stack([np.asarray(Image.open(p)) for p in sorted((tmp_path / name / "png").iterdir())]).astype(int)

    whole = drawn("whole")
    side = sample.assemble(compose(["experiment=ldm_f4", "debug=tiny"])).module.latent_shape[-1]
    one = drawn("one", f"task.patches={{size: {side}, stride: 1}}")
    assert np.abs(one - whole).max() <= 1  # one crop that is everything
    four = drawn("four", f"task.patches={{size: {side // 2}, stride: {side // 4}}}")
    assert np.abs(four - whole).max() > 2
    torch.testing.assert_close(drawn("again", f"task.patches={{size: {side // 2}, stride: {side // 4}}}"), four)
    with pytest.raises(UserError, match=r"task.patches: crops of 3 at a stride of 2 do not cover"):
        drawn("bad", "task.patches={size: 3, stride: 2}")
    with pytest.raises(UserError, match=r"task.patches: found {'size': 3}, expected"):
        drawn("bad", "task.patches={size: 3}")


def test_a_hybrid_of_text_and_mask_reads_the_picture(tmp_path):
    words = ("conditioner=text_and_mask", "text_encoder=tiny", "text_twin=tiny", "backbone.transformer_depth=1")
    train(tmp_path, "experiment=ldm_inpaint", *words)
    prompts = (*words, "task.num_samples=1", "task.columns=2", "task.prompts=[a circle]")
    output = filled(tmp_path, "ldm_inpaint", *prompts)
    assert len(list((output / "png").iterdir())) == 2


def test_a_conditioner_that_reads_something_else_is_refused(tmp_path):
    train(tmp_path, "experiment=ldm_superres")
    with pytest.raises(
        UserError, match="conditioner: LowResolutionConditioner reads image, which a picture to fill in"
    ):
        filled(tmp_path, "ldm_superres")
