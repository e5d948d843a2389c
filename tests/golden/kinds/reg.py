"""REG (Martinser/REG): REPA's network with a class token beside the latent, in the house's own direction of time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import MLPHead
from repalign.aligners.similarities import Cosine
from repalign.aligners.targets import EncoderTarget
from repalign.backbones.dit import DiT
from repalign.checkpoints.reg import reg_adapter
from repalign.conditioners.label import LabelConditioner
from repalign.errors import unknown_choice
from repalign.guidance.cfg import ClassifierFreeGuidance, NoGuidance
from repalign.nn.stream_io import PatchAndClassIO
from repalign.objectives.denoising import Denoising
from repalign.objectives.streams import WeightedStreams
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import LogitNormal, Uniform
from repalign.samplers.diffusion import Linear
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.state import LATENT, Cond, Output, Streams, TokenSpec
from repalign.training.step import training_losses
from tests.golden.building import RecordedRandom, build_network, collect_gradients, field_under
from tests.golden.kinds.repa import PROJECTOR_KEYS, _StoredEncoder
from tests.golden.kinds.repa_encoders import prepare
from tests.golden.runner import Case, kind, only_keys

CLASS = "class_token"
TIMES = {"uniform": Uniform, "lognormal": LogitNormal}


class _REG(nn.Module):
    """Backbone and aligners with imported weights; aligner k answers to encoder k, the first gives the class token."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], weight: float = 0.5) -> None:
        super().__init__()
        names = [str(k) for k in range(len(config["z_dims"]))]
        self.adapter = reg_adapter(names)
        parts = self.adapter.from_official(weights)

        def streams(shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
            return {LATENT: shape, CLASS: (config["z_dims"][0],)}

        self.backbone: DiT = build_network(config, parts["backbone"], PROJECTOR_KEYS, streams, token_io=PatchAndClassIO)
        grid = self.backbone.io.grid
        self.encoders = {
            name: _StoredEncoder(TokenSpec(d, grid, prefix=1)) for name, d in zip(names, config["z_dims"], strict=True)
        }
        self.tap = f"block.{config['encoder_depth']}"
        self.aligners = nn.ModuleDict(
            {
                name: Aligner(
                    tap=self.tap,
                    target=EncoderTarget(name),
                    head=partial(MLPHead, hidden=config["projector_dim"]),
                    similarities=[(1.0, Cosine())],
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


@kind("reg.forward")
def forward(case: Case) -> dict[str, Tensor]:
    parts, inputs = _REG(case.config, case.weights), case.inputs
    state = Streams({LATENT: inputs["x"], CLASS: inputs["cls_token"]})
    with torch.no_grad():
        output = parts.backbone(state, inputs["t"], Cond(label=inputs["y"]), taps=(parts.tap,))
        assert isinstance(output.pred, Streams)
        projected = {f"zs/{k}": aligner.head(output.taps[parts.tap].data) for k, aligner in parts.aligners.items()}
    return {"v": output.pred[LATENT], "cls_v": output.pred[CLASS], **projected}


@kind("reg.loss")
def loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("model", "path", "weighting", "proj_coeff", "cls_coeff", "class_dropout_prob"))
    if config["path"] != "linear":
        raise unknown_choice("path", config["path"], ["linear"])
    if config["weighting"] not in TIMES:
        raise unknown_choice("weighting", config["weighting"], TIMES)
    parts = _REG(config["model"], case.weights, config["proj_coeff"])
    plain = Denoising(LinearPath(), Velocity(), TIMES[config["weighting"]]())
    draws = {
        "t": inputs["t_uniform" if config["weighting"] == "uniform" else "t_normal"].flatten(),
        f"eps/{LATENT}": inputs["noise"],
        f"eps/{CLASS}": inputs["cls_noise"],
        "drop/label": inputs["label_drop_uniform"],
    }
    random = RecordedRandom(len(inputs["labels"]), draws, {})
    state = Streams({LATENT: inputs["latents"], CLASS: inputs["cls_token"]})
    conditioner = LabelConditioner(config["model"]["num_classes"], drop=config["class_dropout_prob"])
    batch = {"label": inputs["labels"], **{f"features/{k}": inputs[f"features/{k}"] for k in parts.encoders}}
    losses = training_losses(
        backbone=parts.backbone,
        objective=WeightedStreams(plain, {CLASS: config["cls_coeff"]}),
        conditioner=conditioner,
        aligners=dict(parts.aligners.items()),
        encoders=parts.encoders,
        x_0=state,
        batch=batch,
        random=random,
    )
    draw = plain.draw(state, random)
    step = plain(parts.backbone, state, conditioner(batch, conditioner.draw_drop(random)), draw)
    own = step.losses[f"denoising/{CLASS}"]
    return {
        "t": draw.t,
        "denoising_loss": step.losses[f"denoising/{LATENT}"],
        "cls_loss": own,
        "proj_loss": torch.stack([losses.terms[f"align/{k}"] for k in parts.encoders]).mean(),
        "total_loss": losses.total,
        **{f"grad/{key}": value for key, value in parts.official_gradients(losses.total).items()},
        **{f"grad_cls_loss_only/{key}": value for key, value in parts.official_gradients(own.mean()).items()},
    }


class _Recorded:
    """A backbone that keeps what it is given."""

    def __init__(self, backbone: DiT) -> None:
        self.backbone = backbone
        self.tap_specs, self.uses_carry = backbone.tap_specs, backbone.uses_carry
        self.seen: list[tuple[Streams, Tensor]] = []

    def __call__(self, x_t: Streams, t: Tensor, cond: Cond, **options: Any) -> Output:
        state = x_t.map(Tensor.float)
        self.seen.append((state, t.float()))
        return self.backbone(state, t.float(), cond, **options)


@kind("reg.sampler")
def sampler(case: Case) -> dict[str, Tensor]:
    config, inputs, out = case.config, case.inputs, {}
    only_keys(config, ("model", "num_steps", "runs_cfg_clscfg_low_high"))
    parts = _REG(config["model"], case.weights)
    batch = len(inputs["y"])
    noise = {f"noise/{LATENT}": inputs["step_noise"], f"noise/{CLASS}": inputs["cls_step_noise"]}
    random = RecordedRandom(batch, {}, noise)
    start = Streams({LATENT: inputs["latents"], CLASS: inputs["cls_latents"]})
    null = LabelConditioner(config["model"]["num_classes"]).null(batch, inputs["y"].device).label
    steps = EulerMaruyama(config["num_steps"], Linear(), last_step="mean", last_step_size=0.04, dtype="float64")
    for name, (scale, class_scale, low, high) in config["runs_cfg_clscfg_low_high"].items():
        # The official code guides when the latent's scale is above 1; a class scale of 0 or less is the conditional.
        scales = {CLASS: class_scale if class_scale > 0 else 1.0}
        guidance = ClassifierFreeGuidance(scale, (low, high), stream_scales=scales) if scale > 1 else NoGuidance()
        recorded = _Recorded(parts.backbone)
        with torch.no_grad():
            field = field_under(guidance, recorded, LinearPath(), Velocity(), inputs["y"], null)
            final = steps(field, start, random)
        out[f"{name}/final"] = final[LATENT]
        out[f"{name}/latent_before_step"] = torch.stack([state[LATENT][:batch] for state, _ in recorded.seen])
        out[f"{name}/cls_before_step"] = torch.stack([state[CLASS][:batch] for state, _ in recorded.seen])
        out[f"{name}/batch_size_at_step"] = torch.tensor([len(t) for _, t in recorded.seen])
        out["t_at_step"] = torch.stack([t[0] for _, t in recorded.seen])
    return out


@kind("reg.encoder_preprocess")
def encoder_preprocess(case: Case) -> dict[str, Tensor]:
    only_keys(case.config, ("resolution",))
    tile, side = case.inputs["tile"], case.config["resolution"]
    image = tile.tile(1, 1, side // tile.shape[-2], side // tile.shape[-1])
    found = {}
    for family in ("dinov2", "clip", "mocov3"):
        prepared = prepare(family, image)
        found[f"{family}/shape"] = torch.tensor(prepared.shape)
        found[f"{family}/subsampled"] = prepared[:, :, ::9, ::9]
        found[f"{family}/row5"] = prepared[0, 1, 5]
    return found
