"""LayerSync (vita-epfl/LayerSync). Its time runs from noise (0) to data (1): t_theirs = 1 - t, v_theirs = -v."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import no_head
from repalign.aligners.self_target import SelfTarget
from repalign.aligners.similarities import Cosine
from repalign.backbones.clocks import ReversedClock
from repalign.backbones.dit import DiT
from repalign.backbones.taps import TapCollector
from repalign.checkpoints.dit import DiTAdapter
from repalign.conditioners.label import LabelConditioner
from repalign.errors import unknown_choice
from repalign.guidance.cfg import guide
from repalign.objectives.denoising import Denoising
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.state import Coefficients, Cond, Draw, Output, Tokens, TokenSpec
from repalign.training.step import losses_at, total_of
from tests.golden.building import RecordedRandom, build_network, collect_gradients, guided_field, recorded_noise
from tests.golden.runner import Case, kind, only_keys

GUIDED_CHANNELS = 3  # of 4: the oddity of the official forward_with_cfg
SCALE = 1.8  # of the case's guided forward, by its procedure
LAYER_KEYS = ("encoder_depth", "gt_encoder_depth")


def build(config: Mapping[str, Any], case: Case) -> DiT:
    """The network behind no clock; its variance half is computed and dropped."""
    sizes = {key: value for key, value in config.items() if key not in LAYER_KEYS}
    return build_network({"learn_sigma": True, **sizes}, DiTAdapter().from_official(case.weights)["backbone"])


def sync(backbone: Any, pair: tuple[int, int], weight: float) -> Aligner:
    """The aligner of a pair of layers."""
    return Aligner(
        tap=f"block.{pair[0]}",
        target=SelfTarget(f"block.{pair[1]}"),
        head=no_head,
        similarities=[(1.0, Cosine())],
        weight=weight,
        tap_specs=backbone.tap_specs,
        features={},
    )


@kind("layersync.forward")
def forward(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    network = build(config, case)
    backbone = ReversedClock(network)
    blocks = [f"block.{k}" for k in range(1, config["depth"] + 1)]
    half = inputs["xc"][: len(inputs["xc"]) // 2]
    with torch.no_grad():
        out = backbone(inputs["x"], 1 - inputs["t"], Cond(label=inputs["y"]), taps=blocks)
        both = -backbone(torch.cat([half, half]), 1 - inputs["tc"], Cond(label=inputs["yc"])).pred
    cond, null = both.chunk(2)
    guided = guide(cond, null, SCALE, GUIDED_CHANNELS)
    # The official function also returns the null half, whose unguided channels are its own.
    null_half = torch.cat([guided[:, :GUIDED_CHANNELS], null[:, GUIDED_CHANNELS:]], 1)
    return {
        "v": -out.pred,
        "h_student": out.taps[f"block.{config['encoder_depth']}"].data,
        "h_teacher": out.taps[f"block.{config['gt_encoder_depth']}"].data,
        "cfg_3ch": torch.cat([guided, null_half]),
        **{f"block_{k}": out.taps[name].data for k, name in enumerate(blocks)},
    }


@kind("layersync.loss")
def loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("model", "reg_weight", "class_dropout_prob", "multi_pairs"))
    model = config["model"]
    network = build(model, case)
    backbone, objective = ReversedClock(network), Denoising(LinearPath(), Velocity(), Uniform())
    conditioner = LabelConditioner(model["num_classes"], config["class_dropout_prob"])
    random = RecordedRandom(len(inputs["labels"]), {"drop/label": inputs["label_drop_uniform"]}, {})
    draw = Draw(1 - inputs["t_uniform"], inputs["noise"], conditioner.draw_drop(random))
    batch, x_0 = {"label": inputs["labels"]}, inputs["latents"]
    shared = {"backbone": backbone, "objective": objective, "conditioner": conditioner, "encoders": {}}

    def terms_of(pairs: Collection[tuple[int, int]], weight: float) -> tuple[dict[str, Tensor], dict[str, Aligner]]:
        aligners = {f"sync_{k}": sync(network, pair, weight) for k, pair in enumerate(pairs)}
        return losses_at(draw, aligners=aligners, x_0=x_0, batch=batch, **shared), aligners

    def per_token(pair: tuple[int, int]) -> Tensor:
        taps = tuple(f"block.{k}" for k in pair)
        step = objective(backbone, x_0, conditioner(batch, draw.drop), draw, taps=taps)
        student, target = (step.output.taps[tap].data for tap in taps)
        return Cosine().per_token(student, target)

    pair = (model["encoder_depth"], model["gt_encoder_depth"])
    terms, aligners = terms_of([pair], config["reg_weight"])
    total, regulariser = total_of(terms, aligners), terms["align/sync_0"]
    gradients = DiTAdapter().to_official({"backbone": collect_gradients(network, total)})
    alone = collect_gradients(network, regulariser)
    beyond = [g for name, g in alone.items() if _is_beyond(name, pair[0]) and bool(g.abs().sum() > 0)]
    alone = DiTAdapter().to_official({"backbone": alone})
    every = [per_token((a, b)) for a, b in config["multi_pairs"]]
    plain = objective(backbone, x_0, conditioner(batch, draw.drop), draw).losses["denoising"]
    return {
        "total_loss": total,
        "diffusion_loss_per_sample": plain,
        "vanilla_loss_per_sample": plain,
        "reg_per_token": per_token(pair),
        "multiple_sync_as_released_per_token": every[-1],
        "multiple_sync_sum_over_pairs_per_token": torch.stack(every).sum(0),
        "num_params_beyond_student_with_reg_gradient": torch.tensor(len(beyond)),
        **{f"grad/{key}": value for key, value in gradients.items()},
        **{f"grad_reg_only/{key}": value for key, value in alone.items()},
    }


def _is_beyond(name: str, layer: int) -> bool:
    """Whether a parameter belongs to a block after a layer, counted from 1."""
    words = name.split(".")
    return words[0] == "blocks" and int(words[1]) >= layer


class _Toy(nn.Module):
    """The case's toy network: two tanh layers that are tapped, and a linear one."""

    uses_carry = False

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in ("w1", "w2", "w3"):
            self.register_parameter(name, nn.Parameter(weights[name].clone()))
        self.tap_specs = {"student": TokenSpec(weights["w1"].shape[1]), "teacher": TokenSpec(weights["w2"].shape[1])}

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, taps: Collection[str] = (), **options: Any) -> Output:
        collector = TapCollector(taps, self.tap_specs)
        student = torch.tanh(x_t @ self.w1)
        teacher = torch.tanh(student @ self.w2)
        collector.offer("student", Tokens(student))
        collector.offer("teacher", Tokens(teacher))
        return Output(teacher @ self.w3, taps=collector.found)


class _StepWeight:
    """A weight that a noise scheduler gives to the step of the whole batch."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, c: Coefficients) -> Tensor:
        return self.weight.expand(c.alpha.shape)


TOY = "h=tanh(x@w1); g=tanh(h@w2); prediction=g@w3; student=h, teacher=g"


@kind("layersync.lora_loss")
def lora_loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("reg_weight", "detach_teacher", "toy_model"))
    if config["toy_model"] != TOY:
        raise unknown_choice("toy_model", config["toy_model"], (TOY,))
    network, x_0 = _Toy(case.weights), inputs["input_latents"]
    aligner = Aligner(
        tap="student",
        target=SelfTarget("teacher", detach=config["detach_teacher"]),
        head=no_head,
        similarities=[(1.0, Cosine())],
        weight=config["reg_weight"],
        tap_specs=network.tap_specs,
        features={},
    )
    time = inputs["timesteps"][inputs["timestep_id"]] / 1000
    objective = Denoising(LinearPath(), Velocity(), Uniform(), _StepWeight(inputs["training_weight"]))
    terms = losses_at(
        Draw(time.expand(len(x_0)), inputs["noise"]),
        backbone=network,
        objective=objective,
        conditioner=LabelConditioner(1),
        aligners={"sync": aligner},
        encoders={},
        x_0=x_0,
        batch={"label": torch.zeros(len(x_0), dtype=torch.int64)},
    )
    total = total_of(terms, {"sync": aligner})
    gradients = collect_gradients(network, total)
    return {
        "loss": terms["denoising"],
        "reg": terms["align/sync"],
        "total_loss": total,
        **{f"grad/{key}": value for key, value in gradients.items()},
    }


@kind("layersync.samplers")
def samplers(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("model", "num_steps", "cfg"))
    z, steps = inputs["z"], config["num_steps"]
    null = torch.full_like(inputs["y"], config["model"]["num_classes"])
    field = guided_field(
        ReversedClock(build(config["model"], case)),
        LinearPath(),
        Velocity(),
        inputs["y"],
        null,
        config["cfg"],
        channels=GUIDED_CHANNELS,
    )
    noise, out = recorded_noise(inputs["step_noise"], len(z)), {}
    runs = {
        "ode_euler": Euler(steps - 1),
        "sde_euler": EulerMaruyama(steps, method="euler"),
        "sde_heun": EulerMaruyama(steps, method="heun"),
    }
    for name, sampler in runs.items():
        # The official ODE also returns the state that it began with.
        states = [z] if name == "ode_euler" else []
        with torch.no_grad():
            sampler(field, z, noise, trace=states.append)
        out[name] = torch.stack(states)
    return out
