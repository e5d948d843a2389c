"""SRA (vvvvvjdy/SRA): the house's own direction of time; its teacher's draws are the stream ``t/teacher``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import TwoLayerHead
from repalign.aligners.similarities import L1, L2, ChannelCosine, SmoothL1
from repalign.aligners.teacher import TeacherTarget
from repalign.aligners.weights import LateDecay
from repalign.backbones.clocks import StepClock, native
from repalign.backbones.dit import DiT
from repalign.checkpoints.sra import SRAAdapter
from repalign.conditioners.label import LabelConditioner
from repalign.errors import unknown_choice
from repalign.nn.embed import patchify
from repalign.objectives.denoising import Denoising
from repalign.objectives.dual_timestep import DualTimestep
from repalign.objectives.variational import VariationalDenoising
from repalign.paths.earlier import LessNoisy, LessNoisyGroups, LessNoisySteps
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Noise, Velocity
from repalign.paths.time import ArctanLogNormal, LogitNormal, Uniform, UniformSteps
from repalign.paths.tokens import TokenPath
from repalign.paths.vp import DiscreteVPPath
from repalign.protocols import Backbone, Objective, Similarity
from repalign.state import Cond, Tokens
from repalign.training.step import StepContext, draw_of, losses_at, total_of
from tests.golden.building import PATHS, RecordedRandom, build_network, collect_gradients
from tests.golden.runner import Case, kind, only_keys

DISTANCES: Mapping[str, Similarity] = {
    "sml1": SmoothL1(0.05),
    "l2": L2(),
    "l1": L1(),
    "cos": ChannelCosine(),
}
TIMES = {
    ("uniform", "linear"): Uniform,
    ("uniform", "cosine"): Uniform,
    ("lognormal", "linear"): LogitNormal,
    ("lognormal", "cosine"): ArctanLogNormal,
}
GAP = 0.2  # largest difference of times in the variant with two timesteps


def distance(name: str) -> Similarity:
    """A distance by its official name."""
    if name not in DISTANCES:
        raise unknown_choice("loss_type", name, DISTANCES)
    return DISTANCES[name]


def network(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[DiT, TwoLayerHead]:
    """A transformer and its head with official weights."""
    parts = SRAAdapter().from_official(weights)
    head = TwoLayerHead(config["hidden_size"], config["hidden_size"])
    head.load_state_dict(parts["aligners.sra.head"])
    return build_network(config, parts["backbone"]), head


def under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


class _SRA(nn.Module):
    """Student, teacher and aligner of a case."""

    def __init__(
        self,
        config: Mapping[str, Any],
        model: Mapping[str, Any],
        case: Case,
        target: Mapping[str, Any],
        similarity: Similarity,
        weight: float,
        clock: Any = native,
    ) -> None:
        super().__init__()
        self.network, head = network(model, under("student.", case.weights))
        self.teacher: Backbone = clock(network(model, under("teacher.", case.weights))[0].requires_grad_(False))
        self.backbone: Backbone = clock(self.network)
        self.conditioner = LabelConditioner(model["num_classes"], model.get("class_dropout_prob", 0.1))
        self.similarity = similarity
        self.aligner = Aligner(
            tap=f"block.{config['block_out_s']}",
            target=TeacherTarget(f"block.{config['block_out_t']}", **target),
            head=lambda in_dim, out_dim: head,
            similarities=[(1.0, similarity)],
            weight=weight,
            tap_specs=self.network.tap_specs,
            features={},
        )

    def run(self, objective: Objective, x_0: Tensor, label: Tensor, random: RecordedRandom) -> dict[str, Tensor]:
        """Losses as the official code returns them, and gradients of their sum by official keys."""
        aligners, batch = {"sra": self.aligner}, {"label": label}
        draw = draw_of(objective, self.conditioner, x_0, random)
        shared = {"objective": objective, "conditioner": self.conditioner, "x_0": x_0, "batch": batch}
        shared |= {"backbone": self.backbone, "teacher": self.teacher, "random": random}
        terms = losses_at(draw, aligners=aligners, encoders={}, **shared)
        total = total_of(terms, aligners)
        gradients = SRAAdapter().to_official(
            {
                "backbone": collect_gradients(self.network, total),
                "aligners.sra.head": collect_gradients(self.aligner.head, total),
            }
        )
        cond = self.conditioner(batch, draw.drop)
        step = objective(self.backbone, x_0, cond, draw, taps=self.aligner.taps)
        found = dict(step.losses)
        if isinstance(self.similarity, ChannelCosine):
            context = StepContext(
                None,
                x_0,
                cond,
                draw,
                step,
                self.backbone,
                self.teacher,
                _no_features,
                random,
                lambda: Cond(label=label),
            )
            student = self.aligner.head(step.output.taps[self.aligner.tap].data)
            found["align_loss"] = self.similarity.per_channel(student, self.aligner.target(context).data)
        else:
            found["align_loss"] = terms["align/sra"].reshape(1)
        return {**found, "total": total.reshape(1), **{f"grad/{key}": value for key, value in gradients.items()}}


def _no_features(name: str) -> Tokens:
    raise AssertionError("SRA reads no encoder")


@kind("sra.forward")
def forward(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("model", "ad"))
    backbone, head = network(config["model"], case.weights)
    tap = f"block.{config['ad']}"
    conditioner = LabelConditioner(config["model"]["num_classes"], config["model"].get("class_dropout_prob", 0.1))
    random = RecordedRandom(len(inputs["y"]), {"drop/label": inputs["drop_u"]}, {})
    dropped = conditioner({"label": inputs["y"]}, conditioner.draw_drop(random))
    with torch.no_grad():
        plain = backbone(inputs["x"], inputs["t"], Cond(label=inputs["y"]), taps=(tap,))
        trained = backbone(inputs["x"], inputs["t"], dropped, taps=(tap,))
        return {
            "v": plain.pred,
            "feat_eval": plain.taps[tap].data,
            "v_train": trained.pred,
            "feat_train": head(trained.taps[tap].data),
            "labels_train": dropped.label,
        }


@kind("sra.loss")
def loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    known = ("model", "path_type", "weighting", "block_out_s", "block_out_t", "t_max", "loss_types", "align_weight")
    only_keys(config, (*known, "grads"))
    form = (config["weighting"], config["path_type"])
    if form not in TIMES:
        raise unknown_choice("weighting/path_type", "/".join(form), ["/".join(known) for known in TIMES])
    path = PATHS[config["path_type"]]()
    objective = Denoising(path, Velocity(), TIMES[form]())
    out: dict[str, Tensor] = {}
    for name in config["loss_types"]:
        target = {"path": path, "time": LessNoisy(config["t_max"])}
        parts = _SRA(config, config["model"], case, target, distance(name), config["align_weight"][name])
        draws = {
            "t": inputs["time_u"].flatten(),
            "t/teacher": inputs["interval_u"].flatten(),
            "eps": inputs["noise"],
            "drop/label": inputs["drop_u"],
        }
        found = parts.run(objective, inputs["images"], inputs["y"], RecordedRandom(len(inputs["y"]), draws, {}))
        out |= {f"{name}/gen_loss": found["denoising"]} | {f"{name}/{k}": found[k] for k in ("align_loss", "total")}
        out |= {f"{name}/grad/{key}": found[f"grad/{key}"] for key in config["grads"]}
    return out


@kind("sra.dit_loss")
def dit_loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("model", "block_out_s", "block_out_t", "t_max", "align_weight", "grads"))
    fixed = {"input_size": 8, "patch_size": 2, "in_channels": 4, "num_classes": 10, "mlp_ratio": 2, "learn_sigma": True}
    path = DiscreteVPPath()
    target = {"path": path, "time": LessNoisySteps(config["t_max"], path.steps)}
    model = {**fixed, **config["model"]}
    clock = lambda network: StepClock(network, path.steps)
    parts = _SRA(config, model, case, target, distance("sml1"), config["align_weight"], clock)
    objective = VariationalDenoising(path, Noise(), UniformSteps(path.steps))
    draws = {
        "t": inputs["t"],
        "t/teacher": inputs["interval"],
        "eps": inputs["noise"],
        "drop/label": inputs["drop_u"],
    }
    found = parts.run(objective, inputs["x_start"], inputs["y"], RecordedRandom(len(inputs["y"]), draws, {}))
    return {
        "mse": found["denoising"],
        "vb": found["variational"],
        "loss": found["denoising"] + found["variational"],
        "align_loss": found["align_loss"],
        **{f"grad/{key}": found[f"grad/{key}"] for key in config["grads"]},
    }


@kind("sra.align_weight")
def align_weight(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ())
    # Value at the beginning, last epoch with it, epochs to a tenth.
    schedules = {
        "sit_256": LateDecay(0.2, 149, 1000, epoch=1),
        "sit_512": LateDecay(0.2, 99, 800, epoch=1),
        "dit_256": LateDecay(0.04, 149, 1000, epoch=1),
        "dit_512": LateDecay(0.04, 99, 800, epoch=1),
    }
    epochs = case.inputs["epoch"].tolist()
    return {name: torch.tensor([w(e) for e in epochs], dtype=torch.float64) for name, w in schedules.items()}


@kind("sra.dts")
def dual_timesteps(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    known = ("model", "mask_ratio", "block_out_s", "block_out_t", "align_weight", "loss_type", "teacher_t")
    only_keys(config, (*known, "teacher_mask", "grads"))
    if config["teacher_t"] != "sra":
        raise unknown_choice("teacher_t", config["teacher_t"], ("sra",))
    model, patch = config["model"], config["model"]["patch_size"]
    path = TokenPath(LinearPath(), patch)
    target = {"path": path, "time": LessNoisyGroups(GAP), "dropped": False, "separate": config["teacher_mask"]}
    parts = _SRA(config, model, case, target, distance(config["loss_type"]), config["align_weight"])
    out = _mixed_forward(parts.network, inputs, patch)

    objective = DualTimestep(path, Velocity(), Uniform(), patch, config["mask_ratio"])
    letters = "abcdefgh"[: len(config["mask_ratio"])]
    staged = {
        "t": torch.stack([inputs[f"time_{g}"].flatten() for g in letters]),
        "t/teacher": torch.stack([inputs[f"int_{g}"].flatten() for g in letters]),
    }
    draws = {"groups": inputs["perm_u"], "eps": inputs["noise"], "drop/label": inputs["drop_u"]}
    random = RecordedRandom(len(inputs["y"]), draws, staged)
    found = parts.run(objective, inputs["images"], inputs["y"], random)
    out |= {"gen_loss": found["denoising"], "align_loss": found["align_loss"], "total": found["total"]}
    return out | {f"grad/{key}": found[f"grad/{key}"] for key in config["grads"]}


def _mixed_forward(backbone: DiT, inputs: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """Outputs of the network alone: tokens of several images mixed by a mask, each with a time of its own."""
    groups, label = inputs["mask"], Cond(label=inputs["y"])
    tap = "block.2"  # the official procedure's

    def mix(stacked: Tensor) -> Tensor:
        """One image per sample, whose patch n is that of the image number groups[:, n]."""
        images = rearrange(stacked, "(k b) c h w -> b k c h w", b=len(groups))
        rows = images.shape[-2] // patch
        pixels = repeat(groups, "b (h w) -> b 1 c (h p) (w q)", h=rows, p=patch, q=patch, c=images.shape[2])
        return images.gather(1, pixels).squeeze(1)

    with torch.no_grad():
        mixed = backbone(mix(inputs["x2"]), inputs["t_tok"], replace(label, groups=groups), taps=(tap,))
        plain = backbone(inputs["x2"][: len(groups)], inputs["t_tok"][:, 0], label)
    return {
        "tokens": patchify(mixed.pred, patch),
        "feat": mixed.taps[tap].data,
        "gt_token": patchify(mix(inputs["gt2"]), patch),
        "image_plain": plain.pred,
    }
