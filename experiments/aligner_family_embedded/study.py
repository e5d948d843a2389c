"""One small SiT, eight ways to train it, and DDT: trains what is missing, probes, then writes tables and pictures.

    python experiments/aligner_family_embedded/study.py            # 30 runs, about 55 minutes of one core
    python experiments/aligner_family_embedded/study.py --cost     # seconds per step alone, on a quiet machine
    python experiments/aligner_family_embedded/study.py --draw     # tables and pictures from the CSV files alone

Seeds run one after the other, each with all methods, so that a study that was stopped still compares all of them. A run
that has its rows in scores.csv and alignment.csv is not repeated; one that was killed goes on from its checkpoint.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("REPALIGN_ROOT", str(ROOT))

from omegaconf import DictConfig  # noqa: E402

from tasks import fit_pca, probe, train  # noqa: E402
from tasks.check import check_composition  # noqa: E402
from tasks.launch import compose  # noqa: E402
from tasks.report_data import read_run  # noqa: E402

METHODS = {
    **{name: (f"experiment=family_{name}",) for name in ("none", "sra", "layer_sync", "deepflow", "repa")},
    **{name: (f"experiment=family_{name}",) for name in ("reg", "redi", "repa_e", "ddt")},
    # The control that tells DDT's backbone from its alignment.
    "ddt_none": ("experiment=family_ddt", "aligner=none", "method=generative"),
}
SEEDS = (0, 1, 2)
METRICS = ("fd_lite0", "kid_lite0", "is_lite0")
STEPS, EVERY, PICTURES = 300, 100, 320
RUNS = Path(os.environ.get("REPALIGN_RUNS", "runs")) / "aligner_family_embedded"
PCA_FILE = RUNS / "components.safetensors"
COST = (8, 40, 3)  # steps of the short and of the long training whose difference is the cost, and rounds


def main() -> None:
    """Train, probe, measure the cost, draw."""
    os.environ.setdefault("REPALIGN_PCA", str(PCA_FILE))
    if "--draw" not in sys.argv:
        if not PCA_FILE.is_file():
            fit_pca.run(composed("repa", 0, "task=fit_pca", f"task.output={PCA_FILE}"))
        if "--cost" not in sys.argv:
            for seed in SEEDS:
                for method in METHODS:
                    study(method, seed)
        measure_cost()
    from draw import draw  # beside this file; needs the CSV files alone

    draw()


def composed(method: str, seed: int, *words: str) -> DictConfig:
    """The composition of a run, as the command line would make it."""
    cfg = compose(
        [
            *METHODS[method],
            f"seed={seed}",
            f"run_dir={RUNS}/{method}_{seed}",
            "~callbacks.sample_grid",
            *words,
        ]
    )
    check_composition(cfg)
    return cfg


def study(method: str, seed: int) -> None:
    """Train one run and probe it, unless its rows are there."""
    if (method, str(seed)) in {(row["method"], row["seed"]) for row in rows_of("alignment.csv")}:
        return
    scores = (f"callbacks.evaluate.every={EVERY}", f"callbacks.evaluate.num_samples={PICTURES}")
    words = (f"steps={STEPS}", *scores, "callbacks.checkpoint.every=50")
    cfg = composed(method, seed, *words)
    train.run(cfg)
    metrics = read_run(Path(cfg.run_dir)).metrics
    found = [
        (method, seed, int(step), name, f"{value:.5f}")
        for name in METRICS
        for step, value in zip(metrics[name].steps, metrics[name].values, strict=True)
    ]
    values = probe.probe(composed(method, seed, *words, "task=probe"))
    add("scores.csv", ("method", "seed", "step", "score", "value"), found)
    add("alignment.csv", ("method", "seed", "tap", "cknna"), [(method, seed, t, f"{v:.5f}") for t, v in values.items()])


def measure_cost() -> None:
    """CPU seconds per training step: what more steps cost, from the least of three rounds of either length."""
    short, long, rounds = COST
    if {row["method"] for row in rows_of("cost.csv")} == set(METHODS):
        return
    least: dict[tuple[str, int], float] = {}
    for number in range(rounds):
        for method in METHODS:
            for steps in (short, long):
                spent = seconds_of(method, steps, f"{RUNS}/cost/{method}_{steps}_{number}")
                least[method, steps] = min(least.get((method, steps), spent), spent)
    (HERE / "cost.csv").unlink(missing_ok=True)
    rows = [
        (method, f"{(least[method, long] - least[method, short]) / (long - short):.4f}", *parameters(method))
        for method in METHODS
    ]
    add("cost.csv", ("method", "cpu_seconds_per_step", "backbone_parameters", "head_parameters"), rows)


def seconds_of(method: str, steps: int, folder: str) -> float:
    """CPU time of a short training without scores, assembly included."""
    words = (f"run_dir={folder}", "resume=never", "~callbacks.evaluate", "callbacks.checkpoint.every=1000")
    cfg = composed(method, 0, f"steps={steps}", *words)
    began = time.process_time()
    train.run(cfg)
    return time.process_time() - began


def parameters(method: str) -> tuple[int, int]:
    """Trainable weights of the backbone, and of the aligners' heads."""
    from tasks.build import assemble

    trained = assemble(composed(method, 0)).module.trained
    return tuple(  # type: ignore[return-value]
        sum(p.numel() for p in trained[part].parameters() if p.requires_grad) for part in ("backbone", "aligners")
    )


def rows_of(name: str) -> list[dict[str, str]]:
    """A CSV file beside this one; no rows when it is not there."""
    if not (HERE / name).is_file():
        return []
    with open(HERE / name, newline="") as file:
        return list(csv.DictReader(file))


def add(name: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Append a run's rows at once."""
    new = not (HERE / name).is_file()
    with open(HERE / name, "a", newline="") as file:
        csv.writer(file).writerows([header, *rows] if new else rows)


if __name__ == "__main__":
    main()
