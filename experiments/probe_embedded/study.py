"""What do the layers of small SiTs know, with and without alignment, and does it go with their scores?

    python experiments/probe_embedded/study.py FOLDER

FOLDER holds finished run folders of one sweep (config.yaml, checkpoints, metrics.csv), here those of
experiments/aligner_family_embedded. Runs task=probe in each, then writes table.md, layers.png, alignment.png beside
this file and report.html in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from tasks import probe  # noqa: E402
from tasks.probe_rows import Row, read_rows  # noqa: E402
from tasks.report import write_report  # noqa: E402
from tasks.report_data import read_run  # noqa: E402

PICTURES, TIMES = 400, [0.1, 0.3, 0.5, 0.7, 0.9]
METRIC, MEASURE = "fd_lite0", "cknna/main"


def probed(run: Path) -> list[Row]:
    """The numbers of a run, measured when they are not there."""
    if not (run / "probe" / "probe.csv").is_file():
        cfg = OmegaConf.load(run / "config.yaml")
        cfg.run_dir = str(run)
        cfg.task = OmegaConf.load(HERE.parents[1] / "conf" / "task" / "probe.yaml")
        cfg.task.pictures, cfg.task.times, cfg.task.shown = PICTURES, TIMES, 4
        if not cfg.get("encoders"):
            cfg.encoders = {"main": OmegaConf.load(HERE.parents[1] / "conf" / "encoder" / "lite0.yaml")}
            cfg.encoders.main.input_size = cfg.data.image_size
        probe.run(cfg)
    return read_rows(run / "probe" / "probe.csv")


def layers(rows: dict[str, list[Row]]) -> Figure:
    """Accuracy and alignment per layer, a line per time, a column per run."""
    figure = Figure(figsize=(2.6 * len(rows), 5), layout="constrained")
    axes = figure.subplots(2, len(rows), sharey="row", sharex=True, squeeze=False)
    for column, (name, own) in enumerate(rows.items()):
        for line, measure in enumerate(("accuracy", MEASURE)):
            for place, t in enumerate(TIMES):
                chosen = [row for row in own if row.measure == measure and row.t == t]
                numbers = range(1, len(chosen) + 1)
                colour = (0.15, 0.2 + 0.15 * place, 0.85 - 0.15 * place)
                axes[line, column].plot(numbers, [row.value for row in chosen], "o-", color=colour, label=f"t = {t:g}")
            axes[line, column].set_ylabel(measure if column == 0 else "")
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("block")
    axes[0, 0].legend(fontsize=7)
    return figure


def against(rows: dict[str, list[Row]], folder: Path) -> tuple[Figure, list[tuple[str, float, float, float]]]:
    """Best alignment and best accuracy of each run against its score."""
    points = []
    for name, own in rows.items():
        score = read_run(folder / name).metrics[METRIC].values[-1]
        best = [max(row.value for row in own if row.measure == measure) for measure in (MEASURE, "accuracy")]
        points.append((name, float(best[0]), float(best[1]), float(score)))
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, alignment, _, score in points:
        axes.plot([alignment], [score], "o", label=name)
    axes.set(xlabel=f"best {MEASURE} over blocks and times", ylabel=f"{METRIC} at the last step")
    axes.legend(fontsize=7)
    return figure, points


def main() -> None:
    """All of it."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rows = {run.name: probed(run) for run in sorted(folder.iterdir()) if (run / "checkpoints").is_dir()}
    layers(rows).savefig(HERE / "layers.png", dpi=130)
    figure, points = against(rows, folder)
    figure.savefig(HERE / "alignment.png", dpi=130)
    lines = [f"| run | best {MEASURE} | best accuracy | {METRIC} |", "|---|---|---|---|"]
    lines += [f"| {name} | {a:.3f} | {b:.3f} | {score:.1f} |" for name, a, b, score in points]
    (HERE / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), write_report(folder), sep="\n", flush=True)


if __name__ == "__main__":
    main()
