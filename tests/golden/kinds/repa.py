"""REPA (sihyun-yu/REPA): the house's own direction of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import MLPHead
from repalign.aligners.similarities import Cosine
from repalign.aligners.targets import EncoderTarget
from repalign.backbones.dit import DiT
from repalign.checkpoints.repa import REPAAdapter
from repalign.conditioners.label import LabelConditioner
from repalign.errors import unknown_choice
from repalign.objectives.denoising import Denoising
from repalign.paths.parametrization import Velocity
from repalign.paths.time import ArctanLogNormal, LogitNormal, Uniform
from repalign.protocols import Sampler, TimeSampler
from repalign.samplers.diffusion import Linear
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.samplers.heun import Heun
from repalign.state import Cond, Draw, Tokens, TokenSpec
from repalign.training.step import training_losses
from tests.golden.building import (
    PATHS,
    RecordedRandom,
    build_network,
    collect_gradients,
    guided_field,
    recorded_noise,
)
from tests.golden.runner import Case, kind, only_keys

PROJECTOR_KEYS = ("encoder_depth", "z_dims", "projector_dim")
TIMES: Mapping[tuple[str, str], type[TimeSampler]] = {
    ("uniform", "linear"): Uniform,
    ("uniform", "cosine"): Uniform,
    ("lognormal", "linear"): LogitNormal,
    ("lognormal", "cosine"): ArctanLogNormal,
}


class _StoredEncoder:
    """An encoder whose tokens come with the batch."""

    def __init__(self, spec: TokenSpec) -> None:
        self.spec = spec

    def __call__(self, images: Tensor) -> Tokens:
        raise AssertionError("the tokens of a golden case are stored")


class REPAParts(nn.Module):
    """Backbone and aligners with imported weights; aligner k answers to encoder k."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        weight: float = 0.5,
        extra_keys: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        names = [str(k) for k in range(len(config["z_dims"]))]
        self.adapter = REPAAdapter(names, config["encoder_depth"])
        parts = self.adapter.from_official(weights)
        self.backbone: DiT = build_network(config, parts["backbone"], (*PROJECTOR_KEYS, *extra_keys), **options)
        grid = self.backbone.io.grid
        self.encoders = {
            name: _StoredEncoder(TokenSpec(d, grid)) for name, d in zip(names, config["z_dims"], strict=True)
        }
        self.aligners = nn.ModuleDict(
            {
                name: Aligner(
                    tap=f"block.{config['encoder_depth']}",
                    target=EncoderTarget(name),
                    head=partial(MLPHead, hidden=config["projector_dim"]),
                    similarities=[(1.0, Cosine())],
                    # REPA averages over its encoders.
                    weight=weight / len(names),
                    tap_specs=self.backbone.tap_specs,
                    features={other: encoder.spec for other, encoder in self.encoders.items()},
                )
                for name in names
            }
        )
        for name in names:
            self.aligners[name].head.load_state_dict(parts[f"aligners.{name}.head"])

    def official_gradients(self, of: Tensor) -> dict[str, Tensor]:
        """Gradients under the official keys."""
        parts: dict[str, dict[str, Tensor]] = {"backbone": collect_gradients(self.backbone, of)}
        for name, aligner in self.aligners.items():
            parts[f"aligners.{name}.head"] = collect_gradients(aligner.head, of)
        return self.adapter.to_official(parts)


@kind("repa.sit_forward")
def sit_forward(case: Case) -> dict[str, Tensor]:
    parts, inputs = REPAParts(case.config, case.weights), case.inputs
    tap = f"block.{case.config['encoder_depth']}"
    with torch.no_grad():
        output = parts.backbone(inputs["x"], inputs["t"], Cond(label=inputs["y"]), taps=(tap,))
        projected = {f"zs_{name}": aligner.head(output.taps[tap].data) for name, aligner in parts.aligners.items()}
        return {"v": output.pred, "t_emb": parts.backbone.time_embed(inputs["t"]), **projected}


@kind("repa.loss")
def loss(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "proj_coeff", "grads", "variants"))
    config, inputs, out = case.config, case.inputs, {}
    parts = REPAParts(config["model"], case.weights, config["proj_coeff"])
    batch = {"label": inputs["y"], **{f"features/{k}": inputs[f"z_{k}"] for k in parts.encoders}}
    size = len(inputs["y"])
    for variant in config["variants"]:
        only_keys(variant, ("name", "path_type", "weighting"), "variant")
        name, form = variant["name"], (variant["weighting"], variant["path_type"])
        if form not in TIMES:
            raise unknown_choice("variant", "/".join(form), ["/".join(known) for known in TIMES])
        objective = Denoising(PATHS[variant["path_type"]](), Velocity(), TIMES[form]())
        time = inputs.get(f"time_draw_{name}", inputs.get("time_draw"))
        assert time is not None, f"no time draw for the variant '{name}'"
        random = RecordedRandom(size, {"t": time.flatten(), "eps": inputs["noise"], "drop/label": torch.ones(size)}, {})
        losses = training_losses(
            backbone=parts.backbone,
            objective=objective,
            conditioner=LabelConditioner(config["model"]["num_classes"], drop=0.0),
            aligners=dict(parts.aligners.items()),
            encoders=parts.encoders,
            x_0=inputs["images"],
            batch=batch,
            random=random,
        )
        with torch.no_grad():
            draw: Draw = objective.draw(inputs["images"], random)
            step = objective(parts.backbone, inputs["images"], Cond(label=inputs["y"]), draw)
        alignment = torch.stack([losses.terms[f"align/{k}"] for k in parts.encoders]).mean()
        gradients = parts.official_gradients(losses.total)
        out[f"{name}/denoising_loss"] = step.losses["denoising"]
        out[f"{name}/proj_loss"] = alignment.reshape(1)
        out[f"{name}/total"] = losses.total.reshape(1)
        out |= {f"{name}/grad/{key}": gradients[key] for key in config["grads"]}
    return out


RUN_KEYS = ("mode", "num_steps", "cfg_scale", "guidance_low", "guidance_high", "path_type", "heun")


def _sampler(run: Mapping[str, Any]) -> Sampler:
    only_keys(run, RUN_KEYS, "run")
    steps, heun = run["num_steps"], run.get("heun", False)
    if run["mode"] == "sde":
        if heun:
            raise KeyError("run: the official SDE sampler has no heun option")
        return EulerMaruyama(steps, Linear(), last_step="mean", last_step_size=0.04, dtype="float64")
    if run["mode"] != "ode":
        raise unknown_choice("mode", run["mode"], ("ode", "sde"))
    return Heun(steps, correct_last=False, dtype="float64") if heun else Euler(steps, dtype="float64")


@kind("repa.samplers")
def samplers(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "runs"))
    config, inputs, out = case.config, case.inputs, {}
    parts = REPAParts(config["model"], case.weights)
    batch = len(inputs["latents"])
    null = LabelConditioner(config["model"]["num_classes"]).null(batch, inputs["y"].device).label
    for name, run in config["runs"].items():
        interval = (run.get("guidance_low", 0.0), run.get("guidance_high", 1.0))
        path = PATHS[run["path_type"]]()
        field = guided_field(parts.backbone, path, Velocity(), inputs["y"], null, run.get("cfg_scale", 1.0), interval)
        with torch.no_grad():
            out[name] = _sampler(run)(field, inputs["latents"], recorded_noise(inputs["noise"], batch))
    return out
