"""The whole of REPA-E: joint run -> tuned autoencoder with its statistics -> a second stage on it."""

import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import safe_open

from callbacks.checkpoint import checkpoints_in
from repalign.autoencoders.weights import tensors_of
from repalign.errors import UserError
from tasks.build import assemble
from tasks.convert import run as convert
from tasks.launch import compose
from tests.smoke.test_convert_repa_e import JOINT, VAE
from tests.smoke.test_recipes_train import column, train

SIZES = [word for word in VAE if word.startswith("autoencoder.") and "weights" not in word]


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("joint"), *JOINT, *VAE, "ema.decay=0.5", "steps=3")


def averaged(joint_run):
    last = torch.load(checkpoints_in(joint_run)[-1], weights_only=True)["state_dict"]
    return last["ema.module.norm.running_mean"], last["ema.module.norm.running_var"], last


def test_the_run_leaves_the_autoencoder_with_averaged_statistics(joint_run):
    mean, variance, last = averaged(joint_run)
    assert not torch.equal(variance, last["trained.norm.running_var"])
    with safe_open(joint_run / "autoencoder.safetensors", "pt") as file:
        held = json.loads(file.metadata()["provenance"])
        assert torch.equal(file.get_tensor("quant_conv.weight"), last["stage.autoencoder.quant_conv.weight"])
    torch.testing.assert_close(torch.tensor(held["latent_mean"]), mean)
    torch.testing.assert_close(torch.tensor(held["latent_std"]), variance.sqrt())
    assert held["steps"] == 3 and held["data_fingerprint"]


def exported(joint_run, family, source, target):
    words = ["debug=tiny", "task=convert", f"task.family={family}", "task.direction=export", f"task.output={target}"]
    convert(compose([*JOINT, *words, *VAE, f"task.input={source}"]))
    return target


def second_stage(monkeypatch, weights, statistics):
    monkeypatch.setenv("REPALIGN_E2E_VAE", str(weights))
    if statistics is not None:
        monkeypatch.setenv("REPALIGN_E2E_VAE_STATISTICS", str(statistics))
    sizes = [*SIZES, "autoencoder.channels=4", "autoencoder.attention_levels=[]"]
    return ["experiment=e2e_vae_sit_xl", "autoencoder=e2e_vae", *sizes]


@pytest.mark.parametrize("kind", ["own file", "diffusers folder", "REPA-E's files"])
def test_a_second_stage_trains_on_what_was_exported(joint_run, kind, tmp_path, monkeypatch):
    mean, variance, last = averaged(joint_run)
    if kind == "own file":
        weights, statistics = joint_run / "autoencoder.safetensors", None
    elif kind == "diffusers folder":
        weights = exported(joint_run, "diffusers_vae", checkpoints_in(joint_run)[-1], tmp_path / "vae")
        statistics = weights
        theirs = AutoencoderKL.from_pretrained(weights, local_files_only=True)
        torch.testing.assert_close(torch.tensor(theirs.config.latents_std), variance.sqrt())
    else:
        weights = exported(joint_run, "ldm_vae", joint_run / "autoencoder.safetensors", tmp_path / "vae.pt")
        statistics = tmp_path / "vae-latents-stats.pt"
    words = second_stage(monkeypatch, weights, statistics)
    autoencoder = assemble(compose([*words, "debug=tiny"])).autoencoder
    tuned = {k.removeprefix("stage.autoencoder."): v for k, v in last.items() if k.startswith("stage.autoencoder.")}
    assert all(torch.equal(value, tuned[key]) for key, value in tensors_of(autoencoder).items())
    raw = autoencoder.norm.denormalize(torch.ones(1, 4, 1, 1)).flatten()
    torch.testing.assert_close(raw, mean + variance.sqrt())
    losses = column(train(tmp_path / "second", *words), "train/loss")
    assert len(losses) == 2 and all(loss == loss for loss in losses)


def test_live_statistics_and_a_run_without_an_autoencoder(joint_run, tmp_path):
    checkpoint = checkpoints_in(joint_run)[-1]
    words = ["debug=tiny", "task=convert", "task.family=diffusers_vae", "task.direction=export", *VAE]
    words += [f"task.input={checkpoint}", f"task.output={tmp_path / 'live'}", "task.weights=live"]
    convert(compose([*JOINT, *words]))
    stds = json.loads((tmp_path / "live" / "config.json").read_text())["latents_std"]
    _, _, last = averaged(joint_run)
    torch.testing.assert_close(torch.tensor(stds), last["trained.norm.running_var"].sqrt())
    with pytest.raises(UserError, match="trains no autoencoder; give the experiment"):
        convert(compose(["experiment=repa_sit_s", *words]))
