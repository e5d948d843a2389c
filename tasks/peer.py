"""An official code beside ours: the same weights, batch, noise and times give the same numbers; then both are timed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks.peer_steps import PeerSteps
from callbacks.step_times import REGIONS, StepTimes
from lightning_modules.generative import Generative
from repalign.errors import UserError, unknown_choice
from repalign.performance.spread import Spread
from repalign.performance.stopwatch import Stopwatch
from repalign.random import SampleRandom
from repalign.training.step import draw_of, features_of, losses_at, state_of, total_of
from tasks.convert import parts_of
from tasks.peers import peer_of
from tasks.peers.loading import Replay
from tasks.peers.peer import Peer, encoder_of
from tasks.record import commit_of

TOLERANCE = 1e-5  # of outputs and losses in float32, relative to the largest of them
ENCODERS = ("live", "stored")


class BesidePeer:
    """The checkout of ``task.peer`` beside a composition: compared once, then a callback takes its steps after ours.

    Args:
        task: the settings ``peer`` and ``peer_encoder``.
        module: ours; weights that begin at zero get small random values, since zeros hide what stands before them.
        data: prepared.
        trainer: ours, on one device.

    Raises:
        UserError: for what cannot be compared, or numbers that differ by more than :data:`TOLERANCE`.
    """

    def __init__(self, task: Any, module: pl.LightningModule, data: Any, trainer: pl.Trainer) -> None:
        check_settings(task)
        if not isinstance(module, Generative) or trainer.world_size > 1 or trainer.accumulate_grad_batches > 1:
            raise UserError(
                "task.peer: compares trainings of one phase on one device without micro-batches; set "
                "trainer.devices=1 data.accumulate=1 and experiment=repa_sit_s, sit_s, ddt_b or so"
            )
        device = trainer.strategy.root_device
        module.to(device)
        awaken(module.trained)
        self.path = Path(task.peer).expanduser()
        self.module, self.trainer = module, trainer
        self.live = task.peer_encoder == "live"
        self.peer = peer_of(self.path, module)
        batch = data.transfer_batch_to_device(next(iter(data.train_dataloader())), device, 0)
        aligners = [*module.aligners.values()]
        self.encoder = encoder_of(aligners[0]) if aligners else None
        if self.encoder and self.live and "image" not in batch:
            raise UserError(
                "data.keep_images: false, but the official code runs its encoder on the pictures of every step; set "
                "data.keep_images=true, or task.peer_encoder=stored to give it the stored features"
            )
        with precise():
            self.differences = compare(self.peer, module, batch, self._features(batch, live=False))
        require_equal(self.differences, self.peer.name)

    def callback(self, times: StepTimes) -> PeerSteps:
        """Takes the official step after each of ours."""
        return PeerSteps(times, self.step)

    def step(self, batch: dict[str, Any], watch: Stopwatch) -> None:
        """One step as the official loop takes it, under our trainer's precision."""
        peer, module = self.peer, self.module
        features = None
        if self.encoder is not None:
            with torch.no_grad(), watch.region("encoder"):
                features = self._features(batch, self.live)
        with torch.no_grad():
            x_0 = latent_of(module, batch)
        with watch.region("forward"), self.trainer.precision_plugin.forward_context():
            terms, total = peer.losses(x_0, batch["label"], features)
        with watch.region("backward"):
            total.backward()
        with watch.region("optimizer"):
            if peer.clip is not None:
                nn.utils.clip_grad_norm_([*peer.parameters()], peer.clip)
            peer.optimizer.step()
            peer.optimizer.zero_grad(set_to_none=True)
        with watch.region("ema"):
            peer.follow()
        peer.read(terms)

    def row(self, ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
        """What is written of the two: seconds and split of theirs, and the ratio of each pair of neighbouring steps."""
        pairs = list(zip(ours, theirs, strict=True))
        split = {name: Spread.of([step.get(name, 0.0) for step in theirs]).numbers() for name in REGIONS}
        return {
            "name": self.peer.name,
            "commit": commit_of(self.path),
            "encoder": ("live" if self.live else "stored") if self.encoder else "none",
            "differences": self.differences,
            "seconds": Spread.of([sum(step.values()) for step in theirs]).numbers(),
            "split": {name: spread for name, spread in split.items() if spread["p90"] > 0},
            "ratio": Spread.of([sum(b.values()) / sum(a.values()) for a, b in pairs]).numbers(),
        }

    def _features(self, batch: Mapping[str, Any], live: bool) -> Tensor | None:
        if self.encoder is None:
            return None
        stored = f"features/{self.encoder}"
        seen = {name: value for name, value in batch.items() if name != stored} if live else batch
        return features_of(seen, self.module.encoders)(self.encoder).patches.data


def check_settings(task: Any) -> None:
    """Before anything is built.

    Raises:
        UserError: for a ``peer_encoder`` that there is not.
    """
    if task.peer_encoder not in ENCODERS:
        raise unknown_choice("task.peer_encoder", str(task.peer_encoder), ENCODERS)


@torch.no_grad()
def awaken(trained: nn.Module) -> None:
    """Small random values for weights that are all zero, the same every time."""
    random = torch.Generator().manual_seed(0)
    for parameter in trained.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))


@contextmanager
def precise() -> Iterator[None]:
    """Matrix products of float32 without a shortcut."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def latent_of(module: Generative, batch: Mapping[str, Any]) -> Tensor:
    """The normalised latent of a batch, as our step draws it."""
    random = SampleRandom(module.seed, batch["serial"].tolist(), module.device)
    x_0 = state_of(batch, module.autoencoder, module.encoders, module.streams, random)
    assert isinstance(x_0, Tensor)
    return x_0


def compare(peer: Peer, module: Generative, batch: Mapping[str, Any], features: Tensor | None) -> dict[str, float]:
    """Largest difference of prediction and losses over the largest value, of gradients norm over norm."""
    module.train()
    random = SampleRandom(module.seed, batch["serial"].tolist(), module.device)
    x_0 = latent_of(module, batch)
    draw = draw_of(module.objective, module.conditioner, x_0, random)
    seen: list[Tensor] = []
    hook = peer.network.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    with Replay(peer.draws(draw)) as replay:
        terms, total = peer.losses(x_0, batch["label"], features)
    hook.remove()
    if replay.left:
        raise UserError(f"task.peer: the loss of {peer.name} drew {len(replay.left)} times less than was expected")
    total.backward()
    own = losses_at(
        draw,
        backbone=module.backbone,
        objective=module.objective,
        conditioner=module.conditioner,
        aligners=module.aligners,
        encoders=module.encoders,
        x_0=x_0,
        batch=batch,
        random=random,
    )
    own_total = total_of(own, module.aligners, module.progress.step)
    own_total.backward()
    with torch.no_grad():
        step = module.objective(module.backbone, x_0, module.conditioner(batch, draw.drop), draw)
    assert isinstance(step.output.pred, Tensor)
    found = {"output": difference(step.output.pred, peer.sign * seen[0])}
    for name, value in own.items():
        found[name.split("/")[0]] = difference(value, terms[name.split("/")[0]])
    found["loss"] = difference(own_total, total)
    found["gradient"] = gradient_difference(peer, module)
    module.zero_grad()
    peer.optimizer.zero_grad()
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def gradient_difference(peer: Peer, module: Generative) -> float:
    """Norm of the difference over the norm, all parameters together."""
    ours = peer.official(
        {
            part: {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in owner.state_dict(keep_vars=True).items()
            }
            for part, owner in parts_of(module.trained).items()
        }
    )
    squares = [
        ((ours[name].reshape(p.shape) - p.grad).square().sum(), p.grad.square().sum())
        for name, p in peer.named().items()
        if p.grad is not None
    ]
    apart, whole = (torch.stack(of).sum().sqrt() for of in zip(*squares, strict=True))
    return float(apart / whole)


def require_equal(differences: Mapping[str, float], name: str) -> None:
    """A ratio of speeds is fair for the same numbers alone.

    Raises:
        UserError: naming the worst of outputs and losses. Gradients are told and not judged: their sum of many terms
            depends on the order.
    """
    judged = {what: value for what, value in differences.items() if what != "gradient"}
    worst = max(judged, key=lambda what: judged[what])
    if not judged[worst] <= TOLERANCE:  # NaN too
        raise UserError(
            f"task.peer: {worst} differs from that of {name} by {judged[worst]:.2g} of its size, at most "
            f"{TOLERANCE:g} is expected with the same weights and draws; is the composition the one that it trains?"
        )


def tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, heads and lines: the ratios, and the seconds of theirs and ours by region."""
    split = ("encoder", "forward", "backward", "optimizer", "ema")
    ratios, regions = [], []
    for row in rows:
        peer = row["peer"]
        name = f"{peer['name'].split('/')[1]} {(peer['commit'] or '')[:7]}".strip()
        worst = max(value for what, value in peer["differences"].items() if what != "gradient")
        ratio = "{median:.2f} ({p10:.2f}-{p90:.2f})".format(**peer["ratio"])
        seconds = [f"{of['seconds']['median']:.3g}" for of in (peer, row)]
        ratios.append([row["recipe"], name, peer["encoder"], *seconds, ratio, f"{worst:.1e}"])
        regions.append(
            [row["recipe"], *(" : ".join(f"{_median(of, part):.3g}" for of in (peer, row)) for part in split)]
        )
    return [
        (
            "beside the official code",
            ["recipe", "code", "encoder", "their s", "our s", "ratio (p10-p90)", "differ by"],
            ratios,
        ),
        ("seconds, theirs : ours", ["recipe", *split], regions),
    ]


def _median(of: Mapping[str, Any], region: str) -> float:
    return of["split"].get(region, {"median": 0.0})["median"]


def told(differences: Mapping[str, float]) -> str:
    """One line before the clocks start."""
    return "same weights, batch and draws; differences: " + json.dumps(
        {k: float(f"{v:.1e}") for k, v in differences.items()}
    )
