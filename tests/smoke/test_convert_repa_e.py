"""Official files of REPA-E through task=convert: the joint run's with its first stage, and the second stage's."""

import argparse

import pytest
import torch

from repalign.autoencoders.weights import tensors_of
from repalign.errors import UserError
from tasks.build import assemble, load_weights
from tasks.convert import FAMILIES, parts_of, run
from tasks.convert_sections import stage_states
from tasks.launch import compose

VAE = (
    *("autoencoder=sd_vae", "autoencoder.weights=random", "autoencoder.widths=[8,8,8,8]"),
    *("autoencoder.depth=1", "autoencoder.groups=4"),
)
SMALL = ("debug=tiny", "task=convert", "task.family=repa_e", "task.output=unused", *VAE)
JOINT = (
    *("experiment=repa_e_sit_s", "latent_norm@autoencoder.norm=running"),
    "method.first_stage.adversarial.discriminator.width=4",
)
SECOND = ("experiment=repa_sit_s", "latent_norm@autoencoder.norm=file")


def statistics(folder):
    """REPA-E's <vae>-latents-stats.pt."""
    generator = torch.Generator().manual_seed(7)
    std, mean = torch.rand(1, 4, 1, 1, generator=generator) + 0.5, torch.randn(1, 4, 1, 1, generator=generator)
    torch.save({"latents_scale": 1 / std, "latents_bias": mean}, folder / "vae-latents-stats.pt")
    return folder / "vae-latents-stats.pt"


def config(tmp_path, recipe, *words):
    second = () if recipe is JOINT else (f"autoencoder.norm.path={statistics(tmp_path)}",)
    return compose([*recipe, *SMALL, f"paths.runs={tmp_path}", *second, *words])


def official_file(tmp_path, recipe):
    """A file in the official layout, of random numbers, beside what its author's training script puts into it."""
    cfg = config(tmp_path, recipe)
    module = assemble(cfg).module
    states = {name: part.state_dict() for name, part in parts_of(module.trained).items()} | stage_states(module)
    for name, state in states.items():
        if name != "norm" or recipe is JOINT:
            states[name] = {k: torch.rand_like(v) if v.is_floating_point() else v + 3 for k, v in state.items()}
    flat = FAMILIES["repa_e"](module, cfg.task).to_official(states)
    content = {"args": argparse.Namespace(model="SiT-S/2"), "steps": 400000, "opt": {"state": {}, "param_groups": []}}
    for section in ("vae", "discriminator"):
        found = {k.removeprefix(f"{section}."): flat.pop(k) for k in list(flat) if k.startswith(f"{section}.")}
        content |= {section: found} if found else {}
    content |= {"ema": flat, "model": {k: v + 1 for k, v in flat.items()}}
    torch.save(content, tmp_path / "0400000.pt")
    return content


@pytest.mark.parametrize("recipe", [JOINT, SECOND], ids=["joint", "second stage"])
def test_in_and_out_again_is_the_same_file(tmp_path, recipe):
    official = official_file(tmp_path, recipe)
    assert {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "projectors.0.0.weight"} <= official[
        "ema"
    ].keys()
    assert ({"vae", "discriminator"} <= official.keys()) is (recipe is JOINT)
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pt"
    run(config(tmp_path, recipe, f"task.input={tmp_path / '0400000.pt'}", f"task.output={ours}"))
    run(config(tmp_path, recipe, "task.direction=export", f"task.input={ours}", f"task.output={back}"))
    content = torch.load(back, weights_only=True)
    for section in {"model", "ema", "vae", "discriminator"} & official.keys():
        expected = official["ema" if section == "model" else section]
        assert content[section].keys() == expected.keys()
        assert all(torch.equal(content[section][key], expected[key]) for key in expected), section


def test_a_joint_file_sets_networks_and_statistics_of_a_composition(tmp_path):
    official = official_file(tmp_path, JOINT)
    ours = tmp_path / "ours.safetensors"
    run(config(tmp_path, JOINT, f"task.input={tmp_path / '0400000.pt'}", f"task.output={ours}"))
    module = assemble(config(tmp_path, JOINT)).module
    load_weights(module, ours)
    for owner in (module.trained, module.ema.module):
        assert torch.equal(owner["norm"].running_var, official["ema"]["bn.running_var"])
    assert module.autoencoder.norm is module.trained["norm"]
    assert torch.equal(tensors_of(module.autoencoder)["quant_conv.weight"], official["vae"]["quant_conv.weight"])
    discriminator = module.stage["discriminator"].state_dict()
    assert discriminator.keys() == official["discriminator"].keys()
    assert all(torch.equal(discriminator[key], official["discriminator"][key]) for key in discriminator)
    raw = module.generator(ema=True).norm.denormalize(torch.zeros(1, 4, 2, 2))
    torch.testing.assert_close(raw[0, :, 0, 0], official["ema"]["bn.running_mean"])


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        (JOINT, lambda c: c.pop("vae"), "has no section 'vae', but REPAE trains the autoencoder"),
        (SECOND, lambda c: c.update(vae={"quant_conv.bias": torch.zeros(8)}), "is of a joint run"),
        (JOINT, lambda c: [c["ema"].pop(k) for k in list(c["ema"]) if k.startswith("bn.")], "no latent statistics 'bn"),
        (JOINT, lambda c: c["discriminator"].pop("main.0.bias"), "'discriminator.main.0.bias' is absent"),
        (JOINT, lambda c: c["vae"].pop("quant_conv.bias"), "'autoencoder.quant_conv.bias' is absent"),
        (SECOND, lambda c: c["ema"]["bn.running_mean"].add_(1.0), "autoencoder.norm: other statistics than those"),
    ],
    ids=["second for joint", "joint for second", "not REPA-E", "discriminator", "autoencoder", "statistics"],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path, recipe, change, message):
    content = official_file(tmp_path, recipe)
    change(content)
    torch.save(content, tmp_path / "0400000.pt")
    with pytest.raises(UserError, match=message) as raised:
        run(
            config(
                tmp_path, recipe, f"task.input={tmp_path / '0400000.pt'}", f"task.output={tmp_path / 'o.safetensors'}"
            )
        )
    assert "\n" not in str(raised.value) and not (tmp_path / "o.safetensors").exists()


def test_the_small_autoencoder_has_no_official_file(tmp_path):
    words = ["experiment=repa_e_sit_s", "debug=tiny", "task=convert", "task.family=repa_e", "task.direction=export"]
    cfg = compose([*words, f"paths.runs={tmp_path}", f"task.output={tmp_path}/x.pt"])
    with pytest.raises(UserError, match="SmallKLAutoencoder has no published layout"):
        stage_states(assemble(cfg).module)
