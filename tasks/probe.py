"""task=probe: what the hidden states of a trained backbone know, per layer and time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from omegaconf import DictConfig
from torch import Tensor

from callbacks.pictures import save_png
from datamodules.base import ImageDataModule
from datamodules.progress import progress
from repalign.errors import UserError, unknown_choice
from repalign.folders import write_text
from repalign.metrics.alignment import cka, cknna
from repalign.metrics.linear_probe import HEADS, probe_accuracy
from repalign.protocols import Encoder
from repalign.random import SampleRandom
from repalign.state import State, Streams, map_state
from repalign.streams import stream_by_stream
from repalign.training.generate import ImageGenerator
from repalign.training.step import state_of
from repalign.training.tap_features import pooled_taps, tap_tokens
from tasks.instantiate import build
from tasks.probe_pictures import component_grid, heat_map
from tasks.probe_rows import Row, table_of, write_rows
from tasks.processes import device
from tasks.sample import restored, settings


@dataclass(frozen=True)
class Material:
    """What is probed: latents, classes and encoders' features of the same pictures, on the CPU but for the latents."""

    x_0: State
    serials: list[int]
    labels: Int[Tensor, " n"]
    features: dict[str, Float[Tensor, "n d"]]


def run(cfg: DictConfig) -> None:
    """Write numbers (csv, md), a heat map per measure and the principal components into ``task.output``.

    Raises:
        UserError: one line for a missing checkpoint, a tap that does not exist, a time out of range, too few pictures.
    """
    task, output = cfg.task, Path(cfg.task.output)
    _check(task)
    assembly, generator, checkpoint = restored(cfg)
    taps = _taps(task.taps, generator)
    encoders = assembly.encoders or build(cfg.encoders, "encoders")
    chosen = _chosen(assembly.data, task.pictures, task.seed)
    material = gather(assembly.data, generator, assembly.module.streams, encoders, chosen, task.batch_size, task.seed)
    rows = []
    output.mkdir(parents=True, exist_ok=True)
    with progress("probing", len(task.times) * len(taps)) as advance:
        for t in task.times:
            found = tap_tokens(taps, material.x_0, material.serials, t, **_parts(generator, task))
            for tap, features in pooled_taps(found).items():
                rows += measures(tap, t, features, material, task, assembly.data.num_classes)
                advance(1)
            if task.shown:
                save_png(_components(task, assembly.data, generator, material, encoders, taps, t), output / name_of(t))
    write_rows(output / "probe.csv", rows)
    (output / "probe.md").write_text(table_of(rows), encoding="utf-8")
    for measure in sorted({row.measure for row in rows}):
        cells = {(row.tap, row.t): row.value for row in rows if row.measure == measure}
        heat_map(measure, cells, taps, list(task.times)).savefig(output / f"{measure.replace('/', '_')}.png", dpi=150)
    best = {m: max((r for r in rows if r.measure == m), key=lambda r: r.value) for m in {r.measure for r in rows}}
    told = {
        "settings": settings(cfg, checkpoint),
        "pictures": len(chosen),
        "data": assembly.data.fingerprint,
        "encoders": {name: str(getattr(encoder, "fingerprint", "")) for name, encoder in encoders.items()},
        "best": {m: {"tap": row.tap, "t": row.t, "value": row.value} for m, row in sorted(best.items())},
    }
    _write_json(output / "probe.json", told)
    for measure, row in sorted(best.items()):
        print(f"{measure}: best {row.value:.4g} at {row.tap}, t = {row.t:g}", flush=True)
    if not encoders:
        print("encoder: none chosen, so no alignment was measured; set encoder=lite0 or another one", flush=True)
    print(f"{len(rows)} numbers of {len(chosen)} pictures; wrote {output}", flush=True)


def measures(
    tap: str, t: float, features: Float[Tensor, "n d"], material: Material, task: DictConfig, classes: int
) -> list[Row]:
    """Every number of one hidden state at one time."""
    rows = []
    for name, target in material.features.items():
        rows.append(Row(tap, t, f"cknna/{name}", cknna(features, target, task.neighbors)))
        rows.append(Row(tap, t, f"cka/{name}", cka(features, target)))
    if task.head is not None and classes > 1:
        # The pictures are in random order already: the last ones are as good as any.
        held_out = max(1, round(len(features) * task.test_share))
        train, test = slice(0, len(features) - held_out), slice(len(features) - held_out, None)
        accuracy = probe_accuracy(
            features[train],
            material.labels[train],
            features[test],
            material.labels[test],
            classes,
            task.head,
            seed=task.seed,
        )
        rows.append(Row(tap, t, "accuracy", accuracy))
    return rows


@torch.no_grad()
def gather(
    data: ImageDataModule,
    generator: ImageGenerator,
    streams: Any,
    encoders: Mapping[str, Encoder],
    chosen: list[int],
    batch_size: int,
    seed: int,
) -> Material:
    """Latents (and further streams), classes and pooled features of some pictures of the data set."""
    data.setup("fit")
    states: list[State] = []
    features: dict[str, list[Tensor]] = {name: [] for name in encoders}
    for encoder in encoders.values():
        if isinstance(encoder, torch.nn.Module):
            encoder.to(device())
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        images = data.images(part).to(device())
        batch: dict[str, Any] = {"image": images}
        for name, encoder in encoders.items():
            tokens = encoder(images.float() / 255)
            batch[f"features/{name}"] = tokens.data
            features[name].append(tokens.patches.data.float().mean(1).cpu())
        random = SampleRandom(seed, part, device())
        # By the norm that sampling decodes with: the averaged statistics belong to the averaged weights.
        states.append(state_of(batch, generator.autoencoder, encoders, streams, random, generator.norm))
    x_0 = _joined(states)
    labels = torch.from_numpy(np.array(data.source.labels)[chosen])
    return Material(x_0, chosen, labels, {name: torch.cat(parts) for name, parts in features.items()})


def name_of(t: float) -> str:
    """The file of the principal components at a time."""
    return f"components_t{t:g}.png"


@torch.no_grad()
def _components(
    task: DictConfig,
    data: ImageDataModule,
    generator: ImageGenerator,
    material: Material,
    encoders: Mapping[str, Encoder],
    taps: list[str],
    t: float,
) -> Tensor:
    few = slice(0, task.shown)
    images = data.images(material.serials[few]).to(device()).float() / 255
    x_0 = map_state(lambda stream: stream[few], material.x_0)
    parts = {**_parts(generator, task), "batch_size": task.shown}
    (shown,) = tap_tokens(taps, x_0, material.serials[few], t, **parts)
    seen = {name: encoder(images) for name, encoder in encoders.items()}
    on_grid = {name: tokens for name, tokens in seen.items() if tokens.grid is not None}
    return component_grid(images, on_grid, {tap: shown[tap] for tap in taps if shown[tap].grid is not None})


def _joined(states: list[State]) -> State:
    joined = {name: torch.cat(parts) for name, parts in stream_by_stream(*states).items()}
    return Streams(joined) if isinstance(states[0], Streams) else joined[""]


def _check(task: DictConfig) -> None:
    if task.head is not None and task.head not in HEADS:
        raise unknown_choice("task.head", task.head, HEADS)
    for t in task.times:
        if not 0 <= t <= 1:
            raise UserError(f"task.times: expected times in [0, 1], found {t}")
    if not 0 < task.test_share < 1:
        raise UserError(f"task.test_share: expected a share between 0 and 1, found {task.test_share}")


def _taps(wanted: Any, generator: ImageGenerator) -> list[str]:
    specs = generator.backbone.tap_specs
    if wanted is None:
        return [name for name, spec in specs.items() if spec.grid is not None]
    for name in wanted:
        if name not in specs:
            raise unknown_choice("task.taps", name, specs, "tap of this backbone")
    return list(wanted)


def _chosen(data: ImageDataModule, count: int, seed: int) -> list[int]:
    data.setup("fit")
    return np.random.Generator(np.random.Philox(seed)).permutation(len(data.source))[:count].tolist()


def _parts(generator: ImageGenerator, task: DictConfig) -> dict[str, Any]:
    return {
        "backbone": generator.backbone,
        "path": generator.path,
        "conditioner": generator.conditioner,
        "batch_size": task.batch_size,
        "seed": task.seed,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")
