"""task=sharing: which steps of a sampler may share a backbone's carry (DDT's encoder)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from datamodules.progress import progress
from repalign.errors import UserError
from repalign.samplers.refresh import CarrySimilarity, SharedCarry
from repalign.samplers.similarity import choose_steps, write_similarity
from tasks.sample import device, generate, restored, settings, wanted_labels


def run(cfg: DictConfig) -> None:
    """Sample without sharing, write ``similarity.safetensors`` and ``similarity.png``.

    Raises:
        UserError: one line for a backbone without a carry, a sampler that shares already, or a missing checkpoint.
    """
    task = cfg.task
    assembly, generator, checkpoint = restored(cfg)
    if isinstance(generator.sampler, SharedCarry):
        raise UserError("sampler: similarity is measured without sharing; set sampler=ddt_euler or another plain one")
    measured = CarrySimilarity(generator.sampler)
    labels = wanted_labels(cfg, assembly)
    with progress("sampling", len(labels)) as advance:
        watched = replace(generator, sampler=measured)
        for images in generate(watched, labels, task.seed, task.batch_size, device(), range(len(labels))):
            advance(len(images))
    similarity = measured.mean()
    rates = OmegaConf.to_container(task.rates)
    assert isinstance(rates, list)
    output = Path(task.output)
    output.mkdir(parents=True, exist_ok=True)
    write_similarity(output / "similarity.safetensors", similarity, settings(cfg, checkpoint))
    heat_map(similarity, rates).savefig(output / "similarity.png", dpi=150)
    print(f"wrote similarity.safetensors and similarity.png of {len(similarity)} evaluations to {output}", flush=True)


def heat_map(similarity: torch.Tensor, rates: Sequence[float]) -> Figure:
    """The matrix, and below it, for every rate, the steps at which the dynamic programme computes a new carry.

    Raises:
        UserError: for a rate that leaves no step.
    """
    n = len(similarity)
    for rate in rates:
        if not 1 <= rate <= n:
            raise UserError(f"task.rates: expected 1 to {n}, the sampler's evaluations; found {rate}")
    figure = Figure(figsize=(6, 6.4 + 0.25 * len(rates)), layout="constrained")
    matrix, chosen = figure.subplots(2, 1, sharex=True, height_ratios=[6, 0.4 * max(len(rates), 1)])
    image = matrix.imshow(similarity.numpy(), vmax=1, aspect="auto", origin="lower", interpolation="nearest")
    figure.colorbar(image, ax=matrix, label="mean cosine of the carries")
    matrix.set(ylabel="evaluation, from noise", title="similarity of the encoder's state between evaluations")
    for row, rate in enumerate(rates):
        steps = choose_steps(similarity, rate)
        chosen.plot(steps, [row] * len(steps), "|", markersize=9, color="black")
    chosen.set_yticks(range(len(rates)), [f"rate {rate:g}: {int(n / rate)} of {n}" for rate in rates])
    chosen.set(xlabel="evaluation, from noise to data", ylim=(len(rates) - 0.5, -0.5))
    return figure
