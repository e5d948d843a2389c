"""Preference tuning end to end on tiny twins: what begins, what is kept, resume, merging, what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from callbacks.checkpoint import checkpoints_in
from repalign.backbones.clocks import unwrapped
from repalign.errors import UserError
from tasks import convert
from tasks.build import assemble, load_weights
from tasks.launch import compose
from tests.smoke import test_recipes_train as recipes
from tests.smoke.test_recipes_train import column

pytest.importorskip("peft")
RECIPE = "experiment=sd3_dpo_lora"
SHALLOW = "backbone.depth=2"
PLAIN = ("objective=denoising", "~objective.beta")
MOVING = ("optimizer.lr=0.05", "method.scheduler.warmup=1", "objective.beta=20")


def train(folder, *words):
    return recipes.train(folder, *words, SHALLOW)


def test_from_a_run_to_a_merged_network(tmp_path):
    """A base is trained, tuned on pairs by its checkpoint, interrupted and resumed, and merged into a plain network."""
    base = checkpoints_in(train(tmp_path / "base", "experiment=sd3_d24_1024", "steps=3", "ema.decay=0.5"))[-1]
    words = (RECIPE, *MOVING, f"tuning.weights={base}", "tuning.rank=4", "ema.decay=0.5")
    whole = train(tmp_path / "whole", *words, "steps=4")
    train(tmp_path / "parts", *words, "steps=2")
    parts = train(tmp_path / "parts", *words, "steps=4")
    states = [torch.load(checkpoints_in(run)[-1], weights_only=True) for run in (whole, parts)]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    first, second = (state["optimizer_states"][0]["state"] for state in states)
    assert all(torch.equal(first[i][name], second[i][name]) for i in first for name in first[i])

    # The first step is that of a coin, later ones are not; a checkpoint has additions alone.
    assert math.isclose(column(whole, "train/loss")[0], math.log(2), rel_tol=1e-6)
    assert column(whole, "train/figure/margin")[0] == 0 and column(whole, "train/figure/margin")[-1] != 0
    held = states[0]["state_dict"]
    assert all("lora_" in name or name.endswith("given_weights") for name in held if "backbone" in name)
    size = sum(x.numel() for name, x in held.items() if name.startswith("trained."))
    assert size < sum(p.numel() for p in assemble(composed(tmp_path, *words)).module.trained.parameters()) / 2

    # Merged, it is a plain network that predicts as the tuned one does, and one may begin with it.
    merged, tuned = tmp_path / "merged.safetensors", checkpoints_in(whole)[-1]
    task = ("task=convert", "task.family=lora", "task.direction=merge", f"task.input={tuned}", f"task.output={merged}")
    convert.run(composed(tmp_path, *words, *task))
    plain = composed(tmp_path, "experiment=sd3_d24_1024", "task=sample")
    modules = [assemble(cfg).module for cfg in (composed(tmp_path, *words), plain)]
    seen = []
    for module, file in zip(modules, (tuned, merged), strict=True):
        load_weights(module, file)
        batch = {"caption": ["a cat", "a dog"]}
        x = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            network = unwrapped(module.ema.module["backbone"])
            seen.append(network(x, torch.tensor([0.3, 0.7]), module.conditioner(batch)).pred)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
    load_weights(modules[1], base)
    with torch.no_grad():
        network = unwrapped(modules[1].ema.module["backbone"])
        before = network(x, torch.tensor([0.3, 0.7]), modules[1].conditioner(batch)).pred
    assert (before - seen[0]).norm() > 1e-3 * before.norm()
    train(tmp_path / "next", "experiment=sd3_d24_1024", f"init_from={merged}", "steps=1")


def test_additions_need_the_weights_they_were_trained_on(tmp_path):
    bases = [
        checkpoints_in(train(tmp_path / str(seed), "experiment=sd3_d24_1024", "steps=1", f"seed={seed}"))[-1]
        for seed in (0, 1)
    ]
    tuned = checkpoints_in(train(tmp_path / "tuned", RECIPE, f"tuning.weights={bases[0]}"))[-1]
    module = assemble(composed(tmp_path, RECIPE, f"tuning.weights={bases[1]}")).module
    with pytest.raises(UserError, match="low-rank additions to other weights"):
        load_weights(module, tuned)


def test_accumulation_gives_the_same_step(tmp_path):
    whole = train(tmp_path / "a", RECIPE, *MOVING)
    split = train(tmp_path / "b", RECIPE, *MOVING, "data.accumulate=2")
    for name in ("train/loss", "train/figure/margin", "train/figure/error/preferred"):
        torch.testing.assert_close(
            torch.tensor(column(whole, name)), torch.tensor(column(split, name)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("data=synthetic", "data_twin=synthetic"), "objective and data do not go together: DiffusionDPO compares"),
        ((*PLAIN,), "SD3Preference: compares pairs; set objective=diffusion_dpo"),
        ((*PLAIN, "method=sd3"), "would learn both; set objective=diffusion_dpo"),
        (
            ("tuning=full", "~tuning.rank", "~tuning.alpha", "~tuning.layers"),
            "SD3Preference: tunes low-rank additions; set tuning=lora",
        ),
        (("tuning.layers=[qkw]",), "tuning.layers: .*'qkw'"),
        (("tuning.layers=every",), "expected a list of names, or all, found 'every'"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        assemble(composed(tmp_path, RECIPE, *words))


def test_a_tuned_network_begins_by_its_own_key(tmp_path):
    base = checkpoints_in(train(tmp_path / "base", "experiment=sd3_d24_1024", "steps=1"))[-1]
    with pytest.raises(UserError, match="tuning=lora begins with tuning.weights"):
        train(tmp_path / "tuned", RECIPE, f"init_from={base}")


def composed(folder, *words):
    return compose([*words, SHALLOW, "debug=tiny", f"paths.runs={folder}", "run_name=run"])
