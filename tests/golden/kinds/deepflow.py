"""DeepFlow (ByteDance-Seed/DeepFlow): the house's own direction of time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import MLPHead
from repalign.aligners.similarities import Cosine
from repalign.aligners.targets import EncoderTarget
from repalign.backbones.deepflow import DeepFlow
from repalign.checkpoints.deepflow import KEYS, deepflow_adapter
from repalign.conditioners.label import LabelConditioner
from repalign.errors import unknown_choice
from repalign.nn.vera import VeRA
from repalign.objectives.deepflow import DeepSupervision
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Ladder, LogitNormal, Uniform
from repalign.samplers.diffusion import Linear
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.state import Cond, TokenSpec
from repalign.training.step import draw_of, losses_at, total_of
from tests.golden.building import RecordedRandom, collect_gradients, guided_field, recorded_noise
from tests.golden.runner import Case, kind, only_keys

MODEL_KEYS = (
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "class_dropout_prob",  # of training alone
    "qk_norm",
    "ssl_align",
    "z_dims",
    "projector_dim",
    "df_idxs",
    "legacy_scaling",
)
SCALE_LIMIT = 5.0  # of ``legacy_scaling``
TIMES = {"lognormal": (LogitNormal, "t_normal"), "uniform": (Uniform, "t_uniform")}


def scale_limit(legacy: bool) -> float | None:
    return SCALE_LIMIT if legacy else None


class _DeepFlow(nn.Module):
    """Backbone and aligners with imported weights; with ``ssl_align`` aligner k sits after the k-th VeRA block."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], weight: float = 0.5) -> None:
        super().__init__()
        only_keys(config, MODEL_KEYS, "config of the network")
        branches = [end - start for start, end in pairwise([0, *config["df_idxs"], config["depth"]])]
        names = [str(k) for k in range(1, len(branches))] if config.get("ssl_align", False) else []
        self.adapter = deepflow_adapter(names)
        parts = self.adapter.from_official(weights)
        size = config["input_size"]
        height, width = (size, size) if isinstance(size, int) else size
        self.backbone = DeepFlow(
            latent_shape=(config["in_channels"], height, width),
            num_classes=config["num_classes"],
            patch=config["patch_size"],
            dim=config["hidden_size"],
            depth=config["depth"],
            heads=config["num_heads"],
            branches=branches,
            acceleration_hidden=config["projector_dim"],
            mlp_ratio=config.get("mlp_ratio", 4.0),
            qk_norm=config.get("qk_norm", False),
            scale_limit=scale_limit(config.get("legacy_scaling", False)),
        )
        self.backbone.load_state_dict(parts["backbone"])
        self.aligners = nn.ModuleDict()
        if names and len(config["z_dims"]) != 1:
            raise KeyError(f"config: one encoder is aligned with, found z_dims {config['z_dims']}")
        self.features = {"main": TokenSpec(config["z_dims"][0], self.backbone.io.grid)} if names else {}
        for name in names:
            self.aligners[name] = Aligner(
                tap=f"vera.{name}",
                target=EncoderTarget("main"),
                head=partial(MLPHead, hidden=config["projector_dim"]),
                similarities=[(1.0, Cosine())],
                weight=weight / len(names),
                tap_specs=self.backbone.tap_specs,
                features=self.features,
            )
            self.aligners[name].head.load_state_dict(parts[f"aligners.{name}.head"])
        self.eval()

    def official_gradients(self, of: Tensor) -> dict[str, Tensor]:
        """Gradients under the official keys."""
        parts: dict[str, dict[str, Tensor]] = {"backbone": collect_gradients(self.backbone, of)}
        for name, aligner in self.aligners.items():
            parts[f"aligners.{name}.head"] = collect_gradients(aligner.head, of)
        return self.adapter.to_official(parts)


@kind("deepflow.vera_block")
def vera_block(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("hidden", "acc_hidden", "heads"))
    house = KEYS.to_house({f"df_blocks.0.{key}": value for key, value in case.weights.items()})
    out = {}
    for legacy in (False, True):
        block = VeRA(case.config["hidden"], case.config["heads"], case.config["acc_hidden"], scale_limit(legacy))
        block.load_state_dict({key.removeprefix("vera.0."): value for key, value in house.items()})
        with torch.no_grad():
            acceleration, refined = block.eval()(case.inputs["v"], case.inputs["x"], case.inputs["dt"])
        out |= {f"acc/legacy_{legacy}": acceleration, f"out/legacy_{legacy}": refined}
    return out


@kind("deepflow.forward")
def forward(case: Case) -> dict[str, Tensor]:
    parts, inputs = _DeepFlow(case.config, case.weights), case.inputs
    backbone, cond = parts.backbone, Cond(label=inputs["y"])
    taps = [aligner.tap for aligner in parts.aligners.values()]
    times = torch.stack([inputs[f"t{k}"] for k in range(backbone.branches)], 1)
    with torch.no_grad():
        output = backbone(inputs["x"], times, cond, taps=taps)
        inner = range(backbone.branches - 1)
        return {
            **{f"v/{k}": output.heads[f"velocity.{k + 1}"] for k in inner},
            **{f"a/{k}": output.heads[f"acceleration.{k + 1}"] for k in inner},
            **{f"zs/{k}": a.head(output.taps[a.tap].data) for k, a in enumerate(parts.aligners.values())},
            f"v/{backbone.branches - 1}": output.pred,
            "v_last_zero_gap": backbone(inputs["x"], inputs["t0"], cond).pred,
        }


LOSS_KEYS = (
    "model",
    "weighting",
    "scale_weight",
    "tg_upper_bound",
    "acc_coeff",
    "proj_coeff",
    "class_dropout_prob",
)


@kind("deepflow.loss")
def loss(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, LOSS_KEYS)
    config, inputs = case.config, case.inputs
    if config["weighting"] not in TIMES:
        raise unknown_choice("weighting", config["weighting"], TIMES)
    base, recorded_time = TIMES[config["weighting"]]
    parts = _DeepFlow(config["model"], case.weights, config["proj_coeff"])
    x_0, size, rungs = inputs["latents"], len(inputs["latents"]), parts.backbone.branches
    draws = {
        "t": inputs[recorded_time].flatten(),
        "t/sign": inputs["coin"].expand(size),
        **{f"t/gap.{k}": inputs["gap_uniform"][k - 2].flatten() for k in range(2, rungs + 1)},
        "eps": inputs["noise"],
        "drop/label": inputs["label_drop_uniform"],
    }
    ladder = Ladder(base(), rungs, config["tg_upper_bound"])
    objective, unweighted = (
        DeepSupervision(LinearPath(), ladder, config["scale_weight"], weight) for weight in (config["acc_coeff"], 1.0)
    )
    conditioner = LabelConditioner(config["model"]["num_classes"], config["class_dropout_prob"])
    batch = {"label": inputs["labels"], "features/main": inputs.get("features")}
    draw = draw_of(objective, conditioner, x_0, RecordedRandom(size, draws, {}))
    aligners = dict(parts.aligners.items())
    terms = losses_at(
        draw,
        backbone=parts.backbone,
        objective=objective,
        conditioner=conditioner,
        aligners=aligners,
        encoders={name: SimpleNamespace(spec=spec) for name, spec in parts.features.items()},
        x_0=x_0,
        batch=batch,
    )
    total = total_of(terms, aligners)
    losses = unweighted(parts.backbone, x_0, conditioner(batch, draw.drop), draw).losses
    of_acceleration = parts.official_gradients(losses["acceleration"].mean())
    intermediate_head = [of_acceleration[f"final_layer.0.{part}.weight"] for part in ("linear", "adaLN_modulation.1")]
    out = {
        "denoising_loss": losses["denoising"],
        "acc_loss": losses["acceleration"],
        "total_loss": total,
        "intermediate_head_gradient_of_acc_loss_is_zero": torch.tensor(
            int(not any(gradient.any() for gradient in intermediate_head))
        ),
        **{f"t/{k}": t for k, t in enumerate(draw.t.unbind(1))},
        **{f"grad/{key}": gradient for key, gradient in parts.official_gradients(total).items()},
        **{f"grad_acc_only/{key}": gradient for key, gradient in of_acceleration.items()},
    }
    if aligners:
        out["proj_loss"] = torch.stack([terms[f"align/{name}"] for name in aligners]).mean()
    return out


@kind("deepflow.sampler")
def sampler(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("model", "num_steps", "cfg", "guidance_low", "guidance_high"))
    config, inputs, out = case.config, case.inputs, {}
    parts = _DeepFlow(config["model"], case.weights)
    batch = len(inputs["latents"])
    null = LabelConditioner(config["model"]["num_classes"]).null(batch, inputs["y"].device).label
    interval = (config["guidance_low"], config["guidance_high"])
    integrate = EulerMaruyama(config["num_steps"], Linear(), last_step="mean", last_step_size=0.04, dtype="float64")
    for name, scale in (("cfg", config["cfg"]), ("nocfg", 1.0)):
        field = guided_field(parts.backbone, LinearPath(), Velocity(), inputs["y"], null, scale, interval)
        states = [inputs["latents"]]
        with torch.no_grad():
            random = recorded_noise(inputs["step_noise"], batch)
            out[f"{name}/final"] = integrate(field, inputs["latents"], random, trace=states.append)
        out[f"{name}/latent_before_step"] = torch.stack([state.float() for state in states[:-1]])
    return out
