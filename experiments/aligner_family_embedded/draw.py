"""Table and pictures of the study from its CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

HERE = Path(__file__).resolve().parent
NAMES = {
    "none": "none (SiT)",
    "sra": "SRA",
    "layer_sync": "LayerSync",
    "deepflow": "DeepFlow",
    "repa": "REPA",
    "reg": "REG",
    "redi": "ReDi",
    "repa_e": "REPA-E",
    "ddt": "DDT + REPA",
    "ddt_none": "DDT alone",
}
COLOURS = dict(zip(NAMES, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
SEE = ("reg", "redi")  # whose network sees features of the encoder, noised: drawn hollow
METRICS = ("fd_lite0", "kid_lite0", "is_lite0")


def draw() -> None:
    """Write table.md, curves.png, alignment.png and cost.png, with what is there."""
    scores, alignment, cost = read_scores(), read_alignment(), read_cost()
    table = table_of(scores, alignment, cost)
    (HERE / "table.md").write_text(table, encoding="utf-8")
    print(table)
    curves(scores)
    scatter(scores, alignment)
    if cost:
        costs(scores, cost)


def read_scores() -> dict[str, dict[str, dict[int, dict[int, float]]]]:
    """Method -> score -> seed -> step -> value."""
    found: dict[str, dict[str, dict[int, dict[int, float]]]] = {}
    for row in rows("scores.csv"):
        seeds = found.setdefault(row["method"], {}).setdefault(row["score"], {})
        seeds.setdefault(int(row["seed"]), {})[int(row["step"])] = float(row["value"])
    return found


def read_alignment() -> dict[str, dict[int, dict[str, float]]]:
    """Method -> seed -> tap -> CKNNA."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows("alignment.csv"):
        found.setdefault(row["method"], {}).setdefault(int(row["seed"]), {})[row["tap"]] = float(row["cknna"])
    return found


def read_cost() -> dict[str, tuple[float, int, int]]:
    """Method -> CPU seconds per step, weights of the backbone, weights of the heads."""
    return {
        row["method"]: (
            float(row["cpu_seconds_per_step"]),
            int(row["backbone_parameters"]),
            int(row["head_parameters"]),
        )
        for row in rows("cost.csv")
    }


def rows(name: str) -> Iterator[dict[str, str]]:
    """Rows of a file beside this one, if it is there."""
    if (HERE / name).is_file():
        with open(HERE / name, newline="") as file:
            yield from csv.DictReader(file)


def table_of(scores: dict, alignment: dict, cost: dict) -> str:
    """Mean and deviation over the seeds at the last step, differences to `none` seed by seed, CKNNA, cost."""
    lines = [
        "| method | seeds | fd_lite0 | fd minus none, same seed | kid_lite0 | is_lite0 | CKNNA, best tap | its tap | "
        "CPU s per step | backbone | heads |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, name in NAMES.items():
        if method not in scores:
            continue
        ends = {metric: last(scores[method][metric]) for metric in METRICS}
        seeds = sorted(ends["fd_lite0"])
        base = last(scores["none"]["fd_lite0"])
        differences = [ends["fd_lite0"][seed] - base[seed] for seed in seeds if seed in base]
        tap, values = best_tap(alignment[method])
        seconds, backbone, heads = cost.get(method, (float("nan"), 0, 0))
        known = [f"{seconds:.3f}", f"{backbone / 1e6:.2f} M", f"{heads / 1e6:.2f} M"] if method in cost else ["-"] * 3
        cells = [
            name,
            str(len(seeds)),
            shown(list(ends["fd_lite0"].values()), 1),
            "-" if method == "none" else shown(differences, 1),
            shown(list(ends["kid_lite0"].values()), 3),
            shown(list(ends["is_lite0"].values()), 2),
            shown(values, 3),
            tap,
            *known,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def last(seeds: dict[int, dict[int, float]]) -> dict[int, float]:
    """Seed -> value at its last step."""
    return {seed: values[max(values)] for seed, values in seeds.items()}


def best_tap(seeds: dict[int, dict[str, float]]) -> tuple[str, list[float]]:
    """The tap with the highest mean over the seeds, and its values."""
    taps = next(iter(seeds.values()))
    tap = max(taps, key=lambda name: float(np.mean([values[name] for values in seeds.values()])))
    return tap, [values[tap] for values in seeds.values()]


def shown(values: list[float], digits: int) -> str:
    """Mean, and the deviation where there are several values."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def curves(scores: dict) -> None:
    """fd_lite0 against the step, and its difference to `none` at the same seed and step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    none, steps = scores["none"]["fd_lite0"], [0]
    for method, name in NAMES.items():
        if method not in scores:
            continue
        seeds = scores[method]["fd_lite0"]
        steps = sorted(set.intersection(*(set(values) for values in seeds.values())))
        line(left, steps[1:], np.array([[values[s] for s in steps[1:]] for values in seeds.values()]), method, name)
        paired = [[values[s] - none[k][s] for s in steps[1:]] for k, values in seeds.items() if k in none]
        if method != "none":
            line(right, steps[1:], np.array(paired), method, None)
    left.set(xlabel="step (batch 32)", ylabel="fd_lite0, 320 pictures (lower is better)")
    right.axhline(0, color=COLOURS["none"], linewidth=1)
    right.set(xlabel="step (batch 32)", ylabel="fd_lite0 minus that of none, same seed")
    for axes in (left, right):
        axes.set_xticks(steps[1:])
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(HERE / "curves.png", dpi=150)


def line(axes: Axes, steps: list[int], values: np.ndarray, method: str, label: str | None) -> None:
    """Mean and deviation over the seeds; methods side by side, so that their bars do not hide each other."""
    shift = (list(NAMES).index(method) - 4) * 2.0
    spread = values.std(0, ddof=1) if len(values) > 1 else None
    places = np.array(steps) + shift
    style = {"color": COLOURS[method], "marker": "o", "markersize": 4, "linewidth": 1.5, "capsize": 2}
    axes.errorbar(places, values.mean(0), yerr=spread, label=label, **style)


def scatter(scores: dict, alignment: dict) -> None:
    """CKNNA of the best tap against the score, a dot per run; CKNNA by depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for method, name in NAMES.items():
        if method not in alignment:
            continue
        tap, _ = best_tap(alignment[method])
        ends = last(scores[method]["fd_lite0"])
        points = [(values[tap], ends[seed]) for seed, values in alignment[method].items()]
        filled = "none" if method in SEE else COLOURS[method]
        left.scatter(*zip(*points, strict=True), edgecolors=COLOURS[method], facecolors=filled, label=name, s=28)
        means = {
            tap: np.mean([values[tap] for values in alignment[method].values()])
            for tap in alignment_taps(alignment[method])
        }
        right.plot(range(1, len(means) + 1), list(means.values()), color=COLOURS[method], marker="o", markersize=4)
    left.set(xlabel="CKNNA with the encoder, best tap", ylabel="fd_lite0 (lower is better)")
    right.set(xlabel="block", ylabel="CKNNA with the encoder, mean over the seeds")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(HERE / "alignment.png", dpi=150)


def alignment_taps(seeds: dict[int, dict[str, float]]) -> list[str]:
    """The blocks in the order of depth; DeepFlow's refined features between its branches are no block."""
    return [tap for tap in next(iter(seeds.values())) if not tap.startswith("vera")]


def costs(scores: dict, cost: dict) -> None:
    """The score against the CPU time of all steps."""
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for method, name in NAMES.items():
        if method not in scores or method not in cost:
            continue
        seeds = scores[method]["fd_lite0"]
        steps = sorted(set.intersection(*(set(values) for values in seeds.values())))[1:]
        mean = [np.mean([values[s] for values in seeds.values()]) for s in steps]
        seconds = [s * cost[method][0] for s in steps]
        axes.plot(seconds, mean, color=COLOURS[method], marker="o", markersize=4, label=name)
    axes.set(xscale="log", xlabel="CPU seconds of training", ylabel="fd_lite0, mean over the seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "cost.png", dpi=150)


if __name__ == "__main__":
    draw()
