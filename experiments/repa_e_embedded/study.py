"""REPA-E against its baselines on the embedded data: trains and scores what is missing, then draws table and plot.

    python experiments/repa_e_embedded/study.py [--draw]

Twelve runs, seed by seed; run again, it goes on with the first one that has no rows in scores.csv.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("REPALIGN_ROOT", str(ROOT))

from matplotlib.figure import Figure  # noqa: E402

from callbacks.checkpoint import checkpoints_in, step_of  # noqa: E402
from callbacks.pictures import draw_labels, generate  # noqa: E402
from callbacks.reconstruction_scores import score_reconstructions  # noqa: E402
from repalign.metrics.suite import FeatureMetrics  # noqa: E402
from tasks.build import assemble, load_weights  # noqa: E402
from tasks.instantiate import build  # noqa: E402
from tasks.launch import compose  # noqa: E402
from tasks.report_data import read_run  # noqa: E402
from tasks.train import run  # noqa: E402

VARIANTS = {
    "SiT, frozen VAE": ["experiment=demo", "aligner=none"],
    "REPA, frozen VAE": ["experiment=demo"],
    "REPA-E": ["experiment=repa_e_embedded"],
    "REPA-E, no stop-gradient": ["experiment=repa_e_embedded", "ablation=repa_e_no_stop_gradient"],
}
SEEDS = (0, 1, 2)
STEPS, EVERY = 240, 80
PICTURES = 500
# Without guidance: it would hide what the losses change.
SETTINGS = [
    f"steps={STEPS}",
    "data.batch_size=32",
    "guidance=none",
    "sampler.steps=8",
    "~metric.scores.kid_lite0",
    "~metric.scores.is_lite0",
    "~callbacks.evaluate",
    "~callbacks.sample_grid",
    f"callbacks.checkpoint.every={EVERY}",
    "callbacks.checkpoint.keep=-1",
    "callbacks.journal.every=1",
]
LOSSES = ("denoising", "align/repa")  # their means over the last third of the steps
RECONSTRUCTION = ("psnr", "ssim", "l1", "fd_lite0")
COLUMNS = ("variant", "seed", "step", "score", "value")
Row = tuple[str, int, int, str, float]


def main() -> None:
    """Train and score, then summarise."""
    if "--draw" not in sys.argv:
        for seed in SEEDS:
            for number, variant in enumerate(VARIANTS):
                if not any(row[:2] == (variant, seed) for row in read_rows()):
                    append(list(rows_of(number, variant, seed)))
    rows = read_rows()
    write_table(rows)
    draw(rows)


def rows_of(number: int, variant: str, seed: int) -> Iterator[Row]:
    """Train one run to its end, then score every checkpoint."""
    words = [*VARIANTS[variant], *SETTINGS, f"seed={seed}", "name=repa_e_study", f"run_name=variant{number}_seed{seed}"]
    cfg = compose(words)
    run(cfg)
    assembly = assemble(cfg)
    assembly.data.setup("fit")
    module, metrics = assembly.module.eval(), build(cfg.metric, "metric")
    cache = Path(cfg.paths.cache)
    for checkpoint in checkpoints_in(Path(cfg.run_dir)):
        load_weights(module, checkpoint)
        yield variant, seed, step_of(checkpoint), "fd_lite0", distance(assembly, metrics, cache)
    after = restored(assembly, metrics, cache)
    yield from ((variant, seed, STEPS, name, value) for name, value in after.items())
    if not module.trains_autoencoder:  # all variants begin with the same file: this is before and after
        yield from ((variant, seed, 0, name, value) for name, value in after.items())
    series = read_run(Path(cfg.run_dir)).series
    for name in LOSSES:
        if f"train/{name}" in series:
            last = series[f"train/{name}"].values[-STEPS // 3 :]
            yield variant, seed, STEPS, name, float(last.mean())


def distance(assembly: Any, metrics: FeatureMetrics, cache: Path) -> float:
    """Frechet distance of pictures drawn with the averaged weights; the same noise and labels every time."""
    data = assembly.data
    metrics.reset()
    metrics.prepare(lambda: data.reference_images(64), data.fingerprint, cache / "reference")
    labels = draw_labels("data", PICTURES, 0, range(data.num_classes), data.source.labels, "labels")
    for images in generate(assembly.module.generator(ema=True), labels, seed=0, batch_size=50):
        metrics.update(images)
    return metrics.compute()["fd_lite0"]


def restored(assembly: Any, metrics: FeatureMetrics, cache: Path) -> dict[str, float]:
    """Scores of the autoencoder over all pictures."""
    data = assembly.data
    scores = score_reconstructions(assembly.module.autoencoder, data, metrics, cache, len(data.dataset))
    return {f"rec_{name}": scores[name] for name in RECONSTRUCTION}


def read_rows() -> list[Row]:
    """Everything that was measured so far."""
    path = HERE / "scores.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [
            (r["variant"], int(r["seed"]), int(r["step"]), r["score"], float(r["value"])) for r in csv.DictReader(file)
        ]


def append(rows: list[Row]) -> None:
    """A finished run's numbers."""
    path = HERE / "scores.csv"
    begins = not path.is_file()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if begins:
            writer.writerow(COLUMNS)
        writer.writerows([*row[:4], f"{row[4]:.5g}"] for row in rows)


def over_seeds(rows: list[Row], variant: str, step: int, score: str) -> list[float]:
    """One number per seed."""
    return [row[4] for row in rows if (row[0], row[2], row[3]) == (variant, step, score)]


def written(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.3g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


def write_table(rows: list[Row]) -> None:
    """Scores at the last step; the autoencoder before in the first row."""
    found = [variant for variant in VARIANTS if over_seeds(rows, variant, STEPS, "fd_lite0")]
    titles = ["variant", "seeds", "fd_lite0", *(f"reconstruction {n}" for n in RECONSTRUCTION), *LOSSES]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for variant, step in [(found[0], 0), *((variant, STEPS) for variant in found)]:
        scores = ["fd_lite0", *(f"rec_{n}" for n in RECONSTRUCTION), *LOSSES]
        cells = [written(over_seeds(rows, variant, step, score)) for score in scores]
        seeds = len(over_seeds(rows, variant, STEPS, "fd_lite0")) if step else "-"
        lines.append(f"| {variant if step else 'at the start'} | {seeds} | " + " | ".join(cells) + " |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), flush=True)


def draw(rows: list[Row]) -> None:
    """The Frechet distance against the step, mean and deviation over the seeds; the autoencoder beside it."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, variant in enumerate(VARIANTS):
        steps = sorted({row[2] for row in rows if (row[0], row[3]) == (variant, "fd_lite0")})
        values = [over_seeds(rows, variant, step, "fd_lite0") for step in steps]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        beside = [step + 2 * place for step in steps]  # so that bars do not hide each other
        left.errorbar(beside, [statistics.mean(v) for v in values], spread, marker="o", capsize=3, label=variant)
        after = over_seeds(rows, variant, STEPS, "rec_psnr")
        right.bar(place, statistics.mean(after) if after else 0.0, label=variant)
    left.set(xlabel="transformer updates (batch 32)", ylabel=f"fd_lite0, {PICTURES} pictures (lower is better)")
    left.legend()
    before = statistics.mean(row[4] for row in rows if (row[2], row[3]) == (0, "rec_psnr"))
    right.axhline(before, color="black", linestyle="--", label="before")
    right.legend(handles=[right.lines[-1]], loc="lower left")
    right.set(ylabel="PSNR of reconstructions after training, dB", xticks=[])
    figure.savefig(HERE / "curve.png", dpi=150)


if __name__ == "__main__":
    main()
