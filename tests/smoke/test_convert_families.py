"""Official files and folders of every family through task=convert: in, out, and the same again."""

import pytest
import torch

from repalign.backbones.clocks import unwrapped
from tasks.build import assemble
from tasks.convert import FAMILIES, parts_of, read_official, run, write_official
from tasks.convert_diffusers import CONFIGS
from tasks.convert_pipeline import PIPELINES
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
    ("repa", "repa_sd3_d24"),
    ("sd3", "sd3_d15"),
    ("sd3_diffusers", "sd3_d15"),
    ("pixart", "cross_dit_xl"),
    ("pixart_diffusers", "cross_dit_xl"),
    ("dit_diffusers", "dit_s"),
]


# Families with files of their own: test_convert_unet.py, test_convert_repa_e.py and test_convert_pipeline.py.
ELSEWHERE = {"ldm", "unet_diffusers", "repa_e", *PIPELINES}


def test_every_family_is_converted_here_or_elsewhere():
    assert {family for family, _ in CASES} | ELSEWHERE == set(FAMILIES)


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_in_and_out_again_is_the_same_file(family, recipe, tmp_path, monkeypatch):
    for name in ("IMAGENET", "CC12M", "COCO", "COCO_CAPTIONS"):
        monkeypatch.setenv(f"REPALIGN_{name}", str(tmp_path))

    def config(*words):
        base = [f"experiment={recipe}", "debug=tiny", f"paths.runs={tmp_path}", "task=convert", f"task.family={family}"]
        return compose([*base, *words])

    ending = "" if family in CONFIGS else ".safetensors" if family == "sd3" else ".pt"
    files = [tmp_path / name for name in (f"official{ending}", "ours.safetensors", f"back{ending}")]
    cfg = config(f"task.input={files[0]}", f"task.output={files[1]}")
    module = assemble(cfg).module
    random = {
        name: {key: torch.randn_like(value) for key, value in part.state_dict().items()}
        for name, part in parts_of(module.trained).items()
    }
    adapter = FAMILIES[family](module, cfg.task)
    official = adapter.to_official(random)
    write_official(files[0], family, adapter, official, unwrapped(module.backbone))
    run(cfg)
    run(config("task.direction=export", f"task.input={files[1]}", f"task.output={files[2]}"))
    back = read_official(files[2])
    assert back.keys() == official.keys() and len(official) > 10
    assert all(torch.equal(back[key], official[key]) for key in official)
