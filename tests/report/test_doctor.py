"""task=doctor: a healthy recipe is found so, and planted faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from repalign.encoders.vit import ViTEncoder
from repalign.errors import UserError
from repalign.paths.linear import LinearPath
from repalign.training.ema import EMA
from tasks import doctor, doctor_data, doctor_machine, fingerprints
from tasks.check import check_composition
from tasks.findings import FINE, WRONG
from tasks.launch import CONF, compose

RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
FOLDER = CONF.parent / "experiments" / "fingerprints"
QUICK = ("repa_sit_s", "ddt_b", "ldm_first_stage_vq_f4")


def composed(tmp_path: Path, recipe: str, *words: str):
    typed = [f"experiment={recipe}", "debug=tiny", *words]
    cfg = compose(["task=doctor", *typed, f"paths.runs={tmp_path}", f"paths.cache={tmp_path}", "run_name=run"])
    cfg.overrides = typed
    cfg.task.fingerprints = str(FOLDER)
    check_composition(cfg)
    return cfg


def wrong(findings) -> dict[str, str]:
    return {finding.check: finding.found for finding in findings if finding.state == WRONG}


def test_every_recipe_has_a_fingerprint():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == RECIPES


@pytest.mark.parametrize(
    "recipe", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_is_the_one_whose_fingerprint_is_kept(recipe, tmp_path):
    findings = doctor.training(composed(tmp_path, recipe))
    assert not wrong(findings), wrong(findings)
    assert any(finding.check == "fingerprint" and finding.state == FINE for finding in findings)


def test_a_recipe_twice_is_the_same_to_the_bit(tmp_path):
    one, two = (fingerprints.take(composed(tmp_path, "repa_sit_s"), 10) for _ in range(2))
    assert one.curves == two.curves and one.facts == two.facts


def unscaled(monkeypatch):
    return ["latent_norm@autoencoder.norm=sd", "++autoencoder.norm.scale=0.18215"]


def dead(monkeypatch):
    tokens = ViTEncoder.forward

    def constant(self, images):
        found = tokens(self, images)
        return found.with_data(found.data * 0 + 0.3)

    monkeypatch.setattr(ViTEncoder, "forward", constant)
    return []


def frozen(monkeypatch):
    monkeypatch.setattr(EMA, "update", lambda self, live, update: None)
    return []


def nearly_frozen(monkeypatch):
    return ["ema.decay=0.999999999"]


def swapped(monkeypatch):
    sample = LinearPath.sample
    monkeypatch.setattr(LinearPath, "sample", lambda self, x_0, eps, t: sample(self, eps, x_0, t))
    return []


def too_fast(monkeypatch):
    return ["optimizer.lr=0.001"]


def unconditional(monkeypatch):
    return ["conditioner.drop=1.0"]


def other_encoder(monkeypatch):
    return ["seed=1"]


@pytest.mark.parametrize(
    ("plant", "check", "words"),
    [
        (unscaled, "latent scale", "wrong by a factor of 0.199"),
        (dead, "encoder main", "the encoder is dead"),
        (frozen, "average", "it is frozen"),
        (nearly_frozen, "average", "it is frozen"),
        (swapped, "time", "time is swapped"),
        (too_fast, "learning rate", "0.001 at step 1, expected 0.0001"),
        (unconditional, "conditions", "100 % of the conditions are dropped"),
        (other_encoder, "fingerprint", "is off by"),
    ],
)
def test_a_planted_fault_is_named(plant, check, words, tmp_path, monkeypatch, capsys):
    cfg = composed(tmp_path, "repa_sit_s", *plant(monkeypatch))
    cfg.task.steps = 10
    found = wrong(doctor.training(cfg))
    assert words in found[check], found
    assert f"wrong: {check}: " in capsys.readouterr().out
    assert check == "fingerprint" or len(found) <= 2  # the cause, and that the curves are others


def of_data(tmp_path: Path, *words: str):
    cfg = composed(tmp_path, "repa_sit_s", *words)
    cfg.task.verify = "hash"
    return {finding.check: finding for check in doctor_data.checks(cfg) for finding in check()}


def test_stores_of_these_pictures_are_looked_into(tmp_path):
    before = of_data(tmp_path)
    assert before["pictures"].found.startswith("64 of 4 classes") and before["stores"].found.startswith("0 of 0 whole")
    fingerprints.take(composed(tmp_path, "repa_sit_s"), 2)
    made = of_data(tmp_path)
    assert made["stores"].found.startswith("2 of 2 whole") and not wrong(made.values())
    latents = next(tmp_path.glob("shapes-*/latents-*/moments.00000.npy"))
    content = bytearray(latents.read_bytes())
    content[-5] ^= 4
    latents.write_bytes(content)
    damaged = wrong(of_data(tmp_path).values())
    assert list(damaged) == [f"store {latents.parent.name}"] and "1 of" in damaged[f"store {latents.parent.name}"]


def test_a_store_of_a_dead_network_is_named(tmp_path, monkeypatch):
    dead(monkeypatch)
    fingerprints.take(composed(tmp_path, "repa_sit_s"), 2)
    (found,) = wrong(of_data(tmp_path).values()).values()
    assert found == "the same in 64 rows: the network that made it is dead"


def test_a_folder_that_is_not_there_is_a_finding(tmp_path):
    cfg = compose(["task=doctor", "experiment=sit_s", "data=image_folder", f"data.root={tmp_path}"])
    (found,) = wrong(finding for check in doctor_data.checks(cfg) for finding in check()).values()
    assert str(tmp_path) in found


def test_a_machine_without_what_is_asked_for(tmp_path, monkeypatch):
    cfg = composed(tmp_path, "repa_sit_s")
    assert not wrong(finding for check in doctor_machine.CHECKS for finding in check(cfg))
    cfg.trainer.accelerator = "cuda"
    monkeypatch.setattr(doctor_machine.torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in wrong(doctor_machine.device(cfg))["accelerator"]
    monkeypatch.setattr(doctor_machine.torch, "softmax", lambda x, dim: x)
    assert "the fused kernel is off" in wrong(doctor_machine.attention(cfg))["attention"]
    monkeypatch.setattr(doctor_machine, "ROOM", 10**9)
    assert "run_dir" in {f.check for f in doctor_machine.disks(cfg) if f.state != FINE}


def test_a_check_that_breaks_down_does_not_keep_the_others(tmp_path, monkeypatch, capsys):
    def broken(cfg):
        raise RuntimeError("no device")

    monkeypatch.setattr(doctor_machine, "CHECKS", (broken, doctor_machine.attention))
    with pytest.raises(UserError, match=r"doctor: 1 of \d+ checks are wrong"):
        doctor.run(composed(tmp_path, "repa_sit_s"))
    said = capsys.readouterr().out
    assert "ended with RuntimeError: no device" in said and "attention" in said and "pictures" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["task.verify=all"], "task.verify: expected size or hash"),
        (["task.steps=1"], "task.steps: expected 2 or more"),
        (["task.write=true", "~debug"], "task.write: a fingerprint is of a recipe with debug=tiny"),
    ],
)
def test_options(words, line, tmp_path):
    cfg = composed(tmp_path, "sit_s", *[word for word in words if "=" in word])
    cfg.overrides = [word for word in cfg.overrides if "~debug" not in words or word != "debug=tiny"]
    with pytest.raises(UserError, match=line):
        doctor.run(cfg)


def test_a_file_that_is_no_fingerprint(tmp_path):
    (tmp_path / "sit_s.json").write_text('{"curves": {"a": [1], "b": [1, 2]}, "facts": {}, "versions": {}}')
    with pytest.raises(UserError, match="is no fingerprint"):
        fingerprints.read(tmp_path / "sit_s.json")


def test_recipes_are_composed_before_anything_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine, "CHECKS", (lambda cfg: pytest.fail("looked"),))
    cfg = composed(tmp_path, "sit_s", "task.recipes=[sit_x]", "task.run=true")
    with pytest.raises(UserError, match="Did you mean 'sit_xl'"):
        doctor.run(cfg)
