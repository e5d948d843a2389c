"""U-Nets through task=convert: LDM's checkpoints in and out, and a folder that diffusers loads."""

import pytest
import torch

from tasks.build import assemble
from tasks.convert import FAMILIES, conditioner_of, parts_of, read_official, run
from tasks.launch import compose


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))

    def make(recipe, family, *words):
        base = [f"experiment={recipe}", "debug=tiny", f"paths.runs={tmp_path}", "task=convert", f"task.family={family}"]
        return compose([*base, *words])

    return make


def random_parts(module):
    parts = {**parts_of(module.trained), **conditioner_of(module)}
    return {n: {k: torch.randn_like(v) for k, v in part.state_dict().items()} for n, part in parts.items()}


@pytest.mark.parametrize("recipe", ["ldm_f4", "ldm_f8", "ldm_superres"])
def test_ldm_in_and_out_again_is_the_same_file(recipe, config, tmp_path):
    files = [tmp_path / name for name in ("official.ckpt", "ours.safetensors", "back.ckpt")]
    cfg = config(recipe, "ldm", f"task.input={files[0]}", f"task.output={files[1]}")
    module = assemble(cfg).module
    official = FAMILIES["ldm"](module, cfg.task).to_official(random_parts(module))
    assert ("cond_stage_model.embedding.weight" in official) == (recipe == "ldm_f4")
    torch.save({"state_dict": {**official, "betas": torch.zeros(3)}, "global_step": 5}, files[0])
    run(cfg)
    run(config(recipe, "ldm", "task.direction=export", f"task.input={files[1]}", f"task.output={files[2]}"))
    back = read_official(files[2])
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official)


def test_a_conditioner_that_ldm_has_no_names_for_is_refused(config, tmp_path):
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(ValueError, match="no names for the weights of LayoutConditioner"):
        run(config("ldm_layout", "ldm", f"task.input={tmp_path / 'a.ckpt'}", f"task.output={tmp_path / 'b'}"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ldm_text", "ldm_superres"])
def test_diffusers_loads_the_folder_and_says_the_same(recipe, config, tmp_path):
    import diffusers
    from safetensors.torch import save_file

    from repalign.state import Cond, Tokens
    from tasks.convert_unet import unet_of

    ours, folder = tmp_path / "ours.safetensors", tmp_path / "unet"
    cfg = config(recipe, "unet_diffusers", "task.direction=export", f"task.input={ours}", f"task.output={folder}")
    network = unet_of(assemble(cfg).module)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file({f"backbone/{k}": v for k, v in network.state_dict().items()}, ours, {"format": "repalign"})
    run(cfg)
    kind = diffusers.UNet2DConditionModel if recipe == "ldm_text" else diffusers.UNet2DModel
    theirs = kind.from_pretrained(folder)
    x = torch.randn(2, network.channels + network.concat_channels, 4, 4)
    state, spatial = x[:, : network.channels], x[:, network.channels :] if network.concat_channels else None
    t = torch.tensor([3, 800])
    text = torch.randn(2, 6, network.context_dim) if network.context_dim else None
    with torch.no_grad():
        found = network(state, t.float(), Cond(text=None if text is None else Tokens(text), spatial=spatial)).pred
        expected = theirs(x, t, encoder_hidden_states=text) if text is not None else theirs(x, t)
        torch.testing.assert_close(found, expected.sample, rtol=1e-4, atol=1e-4)
