"""U-REPA: cases that pin the project's own reading of the paper; the house's direction of time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from repalign.aligners.aligner import Aligner
from repalign.aligners.heads import MLPHead
from repalign.aligners.manifold import BatchManifold, IntraManifold, PooledManifold
from repalign.aligners.similarities import Cosine
from repalign.aligners.targets import EncoderTarget
from repalign.backbones.sit_down import SiTDown
from repalign.checkpoints.u_repa import URepaAdapter
from repalign.conditioners.label import LabelConditioner
from repalign.errors import unknown_choice
from repalign.objectives.denoising import Denoising
from repalign.paths.linear import LinearPath
from repalign.paths.parametrization import Velocity
from repalign.paths.time import Uniform
from repalign.state import Cond, Draw, Tokens, TokenSpec
from repalign.training.step import losses_at, total_of
from tests.golden.building import collect_gradients
from tests.golden.runner import Case, kind, only_keys

SCOPES = {"intra": IntraManifold(), "sample_pooled": PooledManifold(), "batch_tokens": BatchManifold()}


class _StoredEncoder:
    """An encoder whose tokens come with the batch."""

    def __init__(self, spec: TokenSpec) -> None:
        self.spec = spec

    def __call__(self, images: Tensor) -> Tokens:
        raise AssertionError("the tokens of a golden case are stored")


@kind("u_repa.loss")
def loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    sizes = ("D", "heads", "depth", "mid_mult", "patch", "latent", "classes", "proj_hidden", "z_dim", "teacher_grid")
    only_keys(config, (*sizes, "tap", "scope", "lambda", "w"))
    if config["scope"] not in SCOPES:
        raise unknown_choice("scope", config["scope"], SCOPES)
    adapter = URepaAdapter()
    parts = adapter.from_official(case.weights)
    network = SiTDown(
        latent_shape=(inputs["x0"].shape[1], config["latent"], config["latent"]),
        num_classes=config["classes"],
        patch=config["patch"],
        dim=config["D"],
        depth=config["depth"],
        heads=config["heads"],
        mid_mult=config["mid_mult"],
    )
    network.load_state_dict(parts["backbone"])
    grid = (config["teacher_grid"], config["teacher_grid"])
    encoder = _StoredEncoder(TokenSpec(config["z_dim"], grid))
    tap = f"middle.{config['tap']}"
    aligner = Aligner(
        tap=tap,
        target=EncoderTarget(),
        head=partial(MLPHead, hidden=config["proj_hidden"]),
        similarities=[(1.0, Cosine()), (config["w"], SCOPES[config["scope"]])],
        weight=config["lambda"],
        resize="student",
        tap_specs=network.tap_specs,
        features={"main": encoder.spec},
    )
    aligner.head.load_state_dict(parts["aligners.u_repa.head"])
    objective, x_0 = Denoising(LinearPath(), Velocity(), Uniform()), inputs["x0"]
    draw, conditioner = Draw(inputs["t"], inputs["noise"]), LabelConditioner(config["classes"])
    terms = losses_at(
        draw,
        backbone=network,
        objective=objective,
        conditioner=conditioner,
        aligners={"u_repa": aligner},
        encoders={"main": encoder},
        x_0=x_0,
        batch={"label": inputs["y"], "features/main": inputs["teacher"]},
    )
    total = total_of(terms, {"u_repa": aligner})
    gradients = adapter.to_official(
        {
            "backbone": collect_gradients(network, total),
            "aligners.u_repa.head": collect_gradients(aligner.head, total),
        }
    )
    with torch.no_grad():
        output = objective(network, x_0, Cond(label=inputs["y"]), draw, taps=(tap,)).output
        middle = output.taps[tap]
        projected = middle.with_data(aligner.head(middle.data)).resize(grid).data
        target = inputs["teacher"]
        manifolds = {f"loss_manifold_{name}": s(projected, target).mean() for name, s in SCOPES.items()}
    return {
        "v": output.pred,
        "middle_tap": middle.data,
        "projected": projected,
        "loss_token": Cosine()(projected, target).mean(),
        **manifolds,
        "loss_flow": terms["denoising"],
        "loss": total,
        **{f"grad/{key}": value for key, value in gradients.items()},
    }
