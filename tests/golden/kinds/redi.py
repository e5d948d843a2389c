"""ReDi (zelaki/ReDi): SiT over latent and features together. Its time runs from noise (0) to data (1), as SiT's."""

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
from repalign.backbones.clocks import ReversedClock
from repalign.backbones.dit import DiT
from repalign.checkpoints.redi import ReDiAdapter
from repalign.conditioners.label import LabelConditioner
from repalign.encoders.pca import PCA, PCAFit
from repalign.encoders.streams import PCAFeatures
from repalign.errors import unknown_choice
from repalign.guidance.cfg import ClassifierFreeGuidance, NoGuidance
from repalign.guidance.representation import RepresentationGuidance
from repalign.nn.stream_io import ChannelIO
from repalign.objectives.denoising import Denoising
from repalign.objectives.streams import StreamDropout, WeightedStreams
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.protocols import Guidance
from repalign.samplers.euler import Euler
from repalign.samplers.euler_maruyama import EulerMaruyama
from repalign.state import LATENT, Cond, State, Streams, Tokens, TokenSpec
from repalign.training.step import training_losses
from tests.golden.building import RecordedRandom, build_network, collect_gradients, field_under
from tests.golden.kinds.repa import _StoredEncoder
from tests.golden.runner import Case, kind, only_keys

FEATURES = "features"
LATENT_CHANNELS = 4
REPA_KEYS = ("repa_loss", "repa_layer", "projector")


def split(joint: Tensor) -> Streams:
    """Joined channels, the latent's first, as streams."""
    return Streams({LATENT: joint[:, :LATENT_CHANNELS], FEATURES: joint[:, LATENT_CHANNELS:]})


def join(state: State) -> Tensor:
    """Streams as joined channels."""
    assert isinstance(state, Streams)
    return torch.cat([state[LATENT], state[FEATURES]], dim=1)


def shapes(joint: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the streams from that of the joined channels."""
    return {LATENT: (LATENT_CHANNELS, *joint[1:]), FEATURES: (joint[0] - LATENT_CHANNELS, *joint[1:])}


class _ReDi(nn.Module):
    """The network behind the reversed clock, with REPA's aligner where the config asks for it."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], weight: float | None = None) -> None:
        super().__init__()
        aligned = bool(config.get("repa_loss", False))
        self.adapter = ReDiAdapter(["repa"] if aligned else [])
        parts = self.adapter.from_official(weights)
        self.network: DiT = build_network(config, parts["backbone"], REPA_KEYS, shapes, token_io=ChannelIO)
        self.backbone = ReversedClock(self.network)
        self.encoders: dict[str, _StoredEncoder] = {}
        self.aligners = nn.ModuleDict()
        if not aligned:
            return
        hidden, width = config.get("projector", (2048, 768))
        self.encoders["main"] = _StoredEncoder(TokenSpec(width, self.network.io.grid))
        self.aligners["repa"] = Aligner(
            tap=f"block.{int(config['repa_layer'])}",
            target=EncoderTarget("main"),
            head=partial(MLPHead, hidden=hidden),
            similarities=[(1.0, Cosine())],
            weight=0.5 if weight is None else weight,
            tap_specs=self.backbone.tap_specs,
            features={"main": self.encoders["main"].spec},
        )
        self.aligners["repa"].head.load_state_dict(parts["aligners.repa.head"])

    def velocity(self, state: State, t: Tensor, label: Tensor) -> State:
        """The official velocity at the official time."""
        pred = self.backbone(state, 1 - t, Cond(label=label)).pred
        assert pred is not None
        return -pred

    def official_gradients(self, of: Tensor) -> dict[str, Tensor]:
        """Gradients under the official keys."""
        parts: dict[str, dict[str, Tensor]] = {"backbone": collect_gradients(self.network, of)}
        for name, aligner in self.aligners.items():
            parts[f"aligners.{name}.head"] = collect_gradients(aligner.head, of)
        return self.adapter.to_official(parts)


def guidance_of(name: str, scale: float) -> Guidance:
    """The official guided forwards by name."""
    known: dict[str, Guidance] = {
        "none": NoGuidance(),
        "cfg_all": ClassifierFreeGuidance(scale),
        "cfg_vae": ClassifierFreeGuidance(scale, stream_scales={FEATURES: 1.0}),
        "rg": RepresentationGuidance(scale, FEATURES),
    }
    if name not in known:
        raise unknown_choice("guidance", name, known)
    return known[name]


@kind("redi.forward")
def forward(case: Case) -> dict[str, Tensor]:
    parts, inputs = _ReDi(case.config, case.weights), case.inputs
    half = len(inputs["x"]) // 2
    kept, t = split(inputs["x"][:half]), inputs["t"][:half]
    label, null = inputs["y"][:half], inputs["y"][half:]
    with torch.no_grad():
        out = {"v": join(parts.velocity(split(inputs["x1"]), inputs["t1"], inputs["y1"]))}
        unguided = join(parts.velocity(kept, t, null))
        for name, scale in (("cfg_all", 2.4), ("cfg_vae", 2.4), ("rg", 1.5)):
            # A field is called at one time for all samples; these have times of their own.
            rows = [
                field_under(
                    guidance_of(name, scale),
                    parts.backbone,
                    LinearPath(),
                    Velocity(),
                    label[i : i + 1],
                    null[i : i + 1],
                )(kept.map(lambda x, i=i: x[i : i + 1]), 1 - t[i]).pred
                for i in range(half)
            ]
            first = -torch.cat([join(row) for row in rows])
            second = first.clone()
            if name == "cfg_vae":  # channels that are not guided keep each half's own value
                second[:, LATENT_CHANNELS:] = unguided[:, LATENT_CHANNELS:]
            out[name] = torch.cat([first, second])
    return out


@kind("redi.loss")
def loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("model", "feature_drop_prob", "lambda_z", "repa_weight", "class_dropout_prob"))
    parts = _ReDi(config["model"], case.weights, config["repa_weight"])
    size, noise, features = len(inputs["labels"]), split(inputs["noise"]), inputs.get("features")
    draws = {
        "t": 1 - inputs["t_uniform"].flatten(),
        f"eps/{LATENT}": noise[LATENT],
        f"eps/{FEATURES}": noise[FEATURES],
        "drop/label": inputs["label_drop_uniform"],
        f"drop/{FEATURES}": inputs["dropout_coin"].reshape(-1).expand(size),
    }
    random = RecordedRandom(size, draws, {})
    objective = WeightedStreams(
        Denoising(LinearPath(), Velocity(), Uniform()),
        {FEATURES: config["lambda_z"]},
        StreamDropout(FEATURES, config["feature_drop_prob"] or 0.0),
    )
    conditioner = LabelConditioner(config["model"]["num_classes"], drop=config["class_dropout_prob"])
    state = split(inputs["joint"])
    batch = {"label": inputs["labels"], **({} if features is None else {"features/main": features})}
    losses = training_losses(
        backbone=parts.backbone,
        objective=objective,
        conditioner=conditioner,
        aligners=dict(parts.aligners.items()),
        encoders=parts.encoders,
        x_0=state,
        batch=batch,
        random=random,
    )
    step = objective(
        parts.backbone, state, conditioner(batch, conditioner.draw_drop(random)), objective.draw(state, random)
    )
    assert step.output.pred is not None
    return {
        "loss_per_sample": step.losses[f"denoising/{LATENT}"] + step.losses[f"denoising/{FEATURES}"],
        "pred": join(-step.output.pred),
        "total_loss": losses.total,
        **({"proj_loss": losses.terms["align/repa"]} if "align/repa" in losses.terms else {}),
        **{f"grad/{key}": value for key, value in parts.official_gradients(losses.total).items()},
    }


RUN_KEYS = ("guidance", "scale", "diffusion_form", "last_step", "last_step_size")


@kind("redi.sampler")
def sampler(case: Case) -> dict[str, Tensor]:
    config, inputs, out = case.config, case.inputs, {}
    only_keys(config, ("model", "num_steps", "runs"))
    parts = _ReDi(config["model"], case.weights)
    batch, steps = len(inputs["y"]), config["num_steps"]
    noise = inputs["step_noise"]
    staged = {f"noise/{LATENT}": noise[:, :, :LATENT_CHANNELS], f"noise/{FEATURES}": noise[:, :, LATENT_CHANNELS:]}
    random = RecordedRandom(batch, {}, staged)
    null = LabelConditioner(config["model"]["num_classes"]).null(batch, inputs["y"].device).label
    start = split(inputs["z"])

    def run(guidance: Guidance, integrate: Any) -> list[Tensor]:
        states: list[State] = []
        with torch.no_grad():
            field = field_under(guidance, parts.backbone, LinearPath(), Velocity(), inputs["y"], null)
            integrate(field, start, random, trace=states.append)
        return [join(state) for state in states]

    for name, options in config["runs"].items():
        only_keys(options, RUN_KEYS, f"run '{name}'")
        integrate = EulerMaruyama(
            steps,
            options["diffusion_form"],
            last_step=str(options["last_step"]).lower(),
            last_step_size=options["last_step_size"],
        )
        states = run(guidance_of(options["guidance"], options["scale"]), integrate)
        out[f"{name}/trajectory"] = torch.stack(states)
    out["ode_euler/trajectory"] = torch.stack([inputs["z"], *run(NoGuidance(), Euler(steps - 1))])
    return out


@kind("redi.pca_features")
def pca_features(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    only_keys(config, ("pca_rank", "token_grid", "latent_grid", "feature_dim"))
    components = inputs["pca_components"]
    pca = PCA(inputs["mean"], inputs["std"], inputs["pca_mean"], components, torch.ones(len(components)))
    grid, side = (config["token_grid"],) * 2, config["latent_grid"]
    source = PCAFeatures(
        config["pca_rank"],
        pca,
        features={"main": TokenSpec(config["feature_dim"], grid)},
        latent_shape=(LATENT_CHANNELS, side, side),
    )
    return {"z_pca": source(Tokens(inputs["dino_tokens"], grid))}


@kind("redi.pca_fit")
def pca_fit(case: Case) -> dict[str, Tensor]:
    # Whitening would change the scores, not the fit; ReDi has none.
    only_keys(case.config, ("n_components", "whiten"))
    tokens = case.inputs["tokens"]
    fit = PCAFit(tokens.shape[-1])
    for part in tokens:
        fit.update(part)
    pca = fit.finish(case.config["n_components"])
    first = pca.components[:4]
    return {
        "mean": pca.mean,
        "std": pca.std,
        "pca_mean": pca.center,
        "explained_variance": pca.variance,
        "components_abs": pca.components.abs(),
        "projector_rank4": first.T @ first,
    }
