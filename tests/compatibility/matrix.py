"""Every choice of four groups with every choice of another: composed from conf/, built, trained for one step.

A cell is a pair of choices. The other two groups have their base choice, or what one of the pair brings along: a token
io its streams, an objective its path and times (``BRINGS``). A file that is new in one of the groups is in the matrix
without being listed here; what it brings along has to be written down if it needs something.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import hydra
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from repalign.conditioners.derive import derived
from repalign.errors import UserError
from tasks.build import assemble
from tasks.check import check_composition
from tasks.instantiate import build
from tasks.launch import CONF, choices, compose

GROUPS = ("backbone", "token_io", "objective", "aligner")
KEYS = {"aligner": "aligners", "text_encoder": "text_encoders"}  # of a group whose files are packaged elsewhere
# Which stand-in debug=tiny takes for a choice.
STAND_INS = {"UNet": "narrow=unet", "text_encoder": "text_twin=tiny"}
BASE = {"token_io": "patch", "objective": "denoising", "aligner": "none"}  # the backbone: the first architecture
SAMPLES = 3  # a number that no other size has, so that nothing broadcasts by chance
CAPTIONS = ["a cat", "a red apple", "two dogs"]

# What a choice needs of other groups. Later groups of GROUPS win, and the two choices of a cell win over all of it.
STREAM_OF_FEATURES = {"streams": "pca_features"}
DISCRETE = {"path": "ddpm", "time_sampler": "uniform_steps", "clock": "steps"}
BRINGS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("backbone", "CrossDiT"): {"conditioner": "text", "text_encoder": "tiny"},
    ("backbone", "DeepFlow"): {"objective": "deepflow"},
    ("backbone", "MMDiT"): {"conditioner": "text_pooled", "text_encoder": "tiny"},
    ("backbone", "UNet"): {"conditioner": "label_token"},
    ("token_io", "patch_and_class"): {"streams": "class_token"},
    ("token_io", "channels"): STREAM_OF_FEATURES,
    ("token_io", "separate"): STREAM_OF_FEATURES,
    ("objective", "deepflow"): {"backbone": "DeepFlow", "time_sampler": "ladder"},
    ("objective", "diffusion_dpo"): {"tuning": "lora", "data": "synthetic_pairs"},
    ("objective", "latent_diffusion"): {**DISCRETE, "path": "ldm", "parametrization": "noise"},
    ("objective", "learned_variance"): {**DISCRETE, "parametrization": "noise"},
    ("objective", "sit_likelihood"): {"path": "gvp", "parametrization": "noise"},
    ("objective", "sit_score"): {"parametrization": "score"},
    ("objective", "sit_velocity_weight"): {"path": "vp", "parametrization": "noise"},
    ("objective", "streams"): {"token_io": "channels"},
    ("objective", "streams_with_dropout"): {"token_io": "channels"},
    ("aligner", "sra_steps"): {**DISCRETE, "objective": "denoising"},
    ("aligner", "sra_groups"): {"objective": "dual_timestep"},
}
# Values, where the composition has the key.
VALUES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("token_io", "patch_and_class"): {
        "encoders.main.class_token": True,
        "objective.dropout.stream": "class_token",
    },
    ("objective", "deepflow"): {"objective.weights": [0.2, 1.0], "time_sampler.rungs": 2},
    ("objective", "diffusion_dpo"): {"tuning.layers": "all"},
    ("objective", "learned_variance"): {"backbone.variance_head": True},
}


@dataclass(frozen=True)
class Result:
    """What became of a composition.

    Attributes:
        refusal: the one line, when it cannot be.
        idle: parts of the backbone with weights that no gradient reaches.
        terms: losses of the step, ``loss`` their total.
        weights: of the aligners, those that are numbers.
    """

    refusal: str | None = None
    idle: tuple[str, ...] = ()
    terms: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


@cache
def node(group: str, choice: str) -> Any:
    """The node that a choice makes, in debug=tiny; interpolations stay."""
    words = [f"{group}={choice}", "debug=tiny", "method=generative"]
    if group == "backbone" and choice.startswith("unet"):
        words.append(STAND_INS["UNet"])
    elif group in STAND_INS:
        words.append(STAND_INS[group])
    cfg = compose(words)
    return copy.deepcopy(cfg._get_node(KEYS.get(group, group)))


@cache
def base() -> DictConfig:
    """The composition that cells change."""
    return compose(["debug=tiny", "method=generative", "data.cache_latents=false", "data.cache_features=false"])


@cache
def architectures() -> dict[str, tuple[str, ...]]:
    """Class of backbone -> its choices, the one with the fewest blocks first: sizes of one class are one row."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "backbone").glob("*.yaml")}

    def whole_of(name: str) -> dict[str, Any]:
        parents = [whole_of(parent) for parent in files[name].get("defaults", []) if parent != "_self_"]
        return {key: value for part in (*parents, files[name]) for key, value in part.items()}

    for name in files:
        whole = whole_of(name)
        if "???" in whole.values():
            continue  # the part that sizes share
        depth = whole["depth"]
        size = (sum(depth) if isinstance(depth, list) else depth, whole["dim"] or 64 * depth, name)
        found.setdefault(whole["_target_"].rpartition(".")[2], []).append(size)
    return {kind: tuple(name for *_, name in sorted(sizes)) for kind, sizes in sorted(found.items())}


@cache
def options(group: str) -> tuple[str, ...]:
    """The rows of a group: architectures of backbones, objectives of diffusion, all files otherwise."""
    if group == "backbone":
        return tuple(architectures())
    found = choices(group)
    if group == "objective":
        found = [name for name in found if hasattr(hydra.utils.get_class(node(group, name)._target_), "draw")]
    return tuple(sorted(found, key=lambda name: (name != BASE[group], name)))


def combination(pair: Mapping[str, str]) -> dict[str, str]:
    """All groups of a cell: the base, what choices bring along, the pair."""
    chosen = {"backbone": "DiT", **BASE}
    # A choice of the pair brings others along, which may bring something themselves.
    for _ in GROUPS:
        whole = {**chosen, **pair}
        for group in GROUPS:
            chosen |= BRINGS.get((group, whole[group]), {})
        chosen |= pair
    return chosen


def configuration(chosen: Mapping[str, str]) -> DictConfig:
    """The composition of a combination, with taps that its backbone has."""
    cfg = copy.deepcopy(base())
    for group, choice in chosen.items():
        name = architectures()[choice][0] if group == "backbone" else choice
        cfg[KEYS.get(group, group)] = copy.deepcopy(node(group, name))
    for group in GROUPS:
        for key, value in VALUES.get((group, chosen[group]), {}).items():
            parent, _, last = key.rpartition(".")
            holder = OmegaConf.select(cfg, parent)
            if isinstance(holder, DictConfig) and (last in holder.keys() or parent == "encoders.main"):  # noqa: SIM118
                OmegaConf.update(cfg, key, value, force_add=True)
    early, late, middle = taps(chosen["backbone"])
    cfg.align.tap = cfg.align.sra.tap = cfg.align.layer_sync.tap = early
    cfg.align.sra.target = cfg.align.layer_sync.target = late
    cfg.align.u_repa.tap = middle
    return cfg


@cache
def taps(architecture: str) -> tuple[str, str, str]:
    """An early and a late hidden state on the grid of 2 x 2 patches, and the one on the coarsest (U-REPA's)."""
    make = build(node("backbone", architectures()[architecture][0]), "backbone")
    backbone = derived(make, latent_shape=(4, 8, 8), num_classes=1, context_dim=24, pooled_dim=16)
    area = {name: spec.grid[0] * spec.grid[1] for name, spec in backbone.tap_specs.items() if spec.grid}
    fine = [name for name, size in area.items() if size == 16]
    coarse = [name for name, size in area.items() if size == min(area.values())]
    return fine[0], fine[-1], coarse[-1]


def batch(cfg: DictConfig) -> dict[str, Any]:
    """Random pictures with labels and captions; two for each of them where the data are pairs."""
    generator = torch.Generator().manual_seed(0)
    each = 2 if "pairs" in cfg.data._target_ else 1
    size = (each * SAMPLES, 3, cfg.data.image_size, cfg.data.image_size)
    return {
        "image": torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        "label": torch.arange(SAMPLES).repeat(each),
        "caption": each * CAPTIONS,
        "serial": torch.arange(SAMPLES).repeat(each),
    }


def step(cfg: DictConfig) -> Result:
    """Check, build and train for one step, as run.py does; weights are moved off their zeros first.

    Raises:
        AssertionError: when a loss or gradient is not finite, or no gradient reaches the backbone or a head.
    """
    try:
        check_composition(cfg)
        module = assemble(cfg).module
        noted: dict[str, Any] = {}
        module.note = lambda total, terms: noted.update(terms, loss=total)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.trained.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        module.train()
        optimizer = module.configure_optimizers()
        module.training_step(batch(cfg), 0).backward()
    except UserError as error:
        return Result(refusal=str(error))
    assert all(torch.isfinite(term) for term in noted.values()), noted
    gradients = {name: p.grad for name, p in module.trained.named_parameters() if p.requires_grad or p.grad is not None}
    idle = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    assert all(torch.isfinite(gradients[name]).all() for name in gradients.keys() - idle)
    assert not any(name.startswith("aligners.") for name in idle), idle
    assert any(name.startswith("backbone.") for name in gradients.keys() - idle)
    optimizer.step()
    module.finish_step()
    weights = {name: float(aligner.weight) for name, aligner in module.aligners.items() if not callable(aligner.weight)}
    parts = sorted({re.sub(r"^(backbone\.)+", "", name).split(".")[0] for name in idle})
    return Result(None, tuple(parts), {name: float(term.detach()) for name, term in noted.items()}, weights)


def pairs() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Every cell: the pair of choices, and the whole combination that stands for it."""
    for first, second in itertools.combinations(GROUPS, 2):
        for a, b in itertools.product(options(first), options(second)):
            pair = {first: a, second: b}
            yield pair, combination(pair)


@cache
def result(chosen: tuple[tuple[str, str], ...]) -> Result:
    """The result of a combination; several cells may share it."""
    return step(configuration(dict(chosen)))
