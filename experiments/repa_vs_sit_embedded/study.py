"""The same small SiT with and without REPA on the embedded data: trains what is missing, then draws table and plot.

    python experiments/repa_vs_sit_embedded/study.py

Six runs of about five minutes on two cores; run again, it continues or only draws. Writes scores.csv, table.md and
curve.png beside this file, and report.html into the sweep's folder.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from tasks.report import write_report  # noqa: E402
from tasks.report_sweep import Variant, band, runs_below, summary, variants_of  # noqa: E402

METRICS = ("fd_lite0", "kid_lite0", "is_lite0")
# Without guidance: it would hide what the loss changes.
COMMAND = [
    "-m",
    "experiment=demo",
    "aligner=none,repa",
    "seed=0,1,2",
    "steps=320",
    "guidance=none",
    "sampler.steps=12",
    "callbacks.evaluate.every=80",
    "callbacks.evaluate.num_samples=300",
    "callbacks.sample_grid.every=320",
    "run_name=repa_vs_sit",
]


def main() -> None:
    """Train, then summarise."""
    folder = Path(os.environ.get("REPALIGN_RUNS", "runs")) / "demo" / "repa_vs_sit"
    if "--draw" not in sys.argv:
        subprocess.run([sys.executable, str(ROOT / "run.py"), *COMMAND], check=True)
    variants = variants_of(runs_below(folder))
    write_scores(variants)
    write_table(variants)
    draw(variants)
    print(write_report(folder))


def write_scores(variants: list[Variant]) -> None:
    """Every score of every run at every step."""
    with open(HERE / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", "step", "score", "value"])
        for variant in variants:
            for run in variant.runs:
                for name in METRICS:
                    for step, value in zip(run.metrics[name].steps, run.metrics[name].values, strict=True):
                        writer.writerow([variant.label, run.config["seed"], int(step), name, f"{value:.4f}"])


def write_table(variants: list[Variant]) -> None:
    """Mean and standard deviation over the seeds at the last step."""
    lines = ["| variant | seeds | " + " | ".join(METRICS) + " |", "|---|---|" + "---|" * len(METRICS)]
    for variant in variants:
        cells = []
        for name in METRICS:
            found = summary(variant, name)
            assert found is not None, f"{variant.label} has no {name}"
            cells.append(f"{found.mean:.3f} ± {found.std or 0:.3f}")
        lines.append(f"| {variant.label} | {len(variant.runs)} | " + " | ".join(cells) + " |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def draw(variants: list[Variant]) -> None:
    """The Frechet distance against the step, mean and deviation over the seeds."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for variant in variants:
        found = band(variant, "fd_lite0")
        assert found is not None, f"{variant.label} has no common step"
        axes.plot(found.steps, found.mean, marker="o", label=variant.label)
        if found.std is not None:
            axes.fill_between(found.steps, found.mean - found.std, found.mean + found.std, alpha=0.2)
    axes.set(xlabel="optimizer step (batch 128)", ylabel="fd_lite0, 300 pictures (lower is better)")
    axes.legend()
    figure.savefig(HERE / "curve.png", dpi=150)


if __name__ == "__main__":
    main()
