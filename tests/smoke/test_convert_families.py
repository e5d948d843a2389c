"""Official files of every family through task=convert: in, out, and the same again."""

import pytest
import torch

from tasks.build import assemble
from tasks.convert import FAMILIES, parts_of, read_official, run
from tasks.launch import compose

CASES = [
    ("sit", "sit_s"),
    ("dit", "dit_s"),
    ("repa", "repa_sit_s"),
    ("sra", "sra_sit_b"),
    ("sra", "sra_dit_b"),
    ("sra", "sra_dts_sit_b"),
    ("layer_sync", "layer_sync_sit_b"),
    ("deepflow", "deepflow_sit_b"),
    ("deepflow", "repa_deepflow_sit_b"),
    ("reg", "reg_sit_b"),
    ("redi", "redi_sit_b"),
    ("redi", "redi_dit_b"),
    ("u_repa", "u_repa_sit_b"),
    ("ddt", "ddt_b"),
]


def test_every_family_is_converted_here():
    assert {family for family, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_in_and_out_again_is_the_same_file(family, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))

    def config(*words):
        base = [f"experiment={recipe}", "debug=tiny", f"paths.runs={tmp_path}", "task=convert", f"task.family={family}"]
        return compose([*base, *words])

    files = [tmp_path / name for name in ("official.pt", "ours.safetensors", "back.pt")]
    cfg = config(f"task.input={files[0]}", f"task.output={files[1]}")
    module = assemble(cfg).module
    random = {
        name: {key: torch.randn_like(value) for key, value in part.state_dict().items()}
        for name, part in parts_of(module.trained).items()
    }
    official = FAMILIES[family](module, cfg.task).to_official(random)
    torch.save({"model": official, "ema": official}, files[0])
    run(cfg)
    run(config("task.direction=export", f"task.input={files[1]}", f"task.output={files[2]}"))
    back = read_official(files[2])
    assert back.keys() == official.keys() and len(official) > 10
    assert all(torch.equal(back[key], official[key]) for key in official)
