"""SD3's pipeline on the embedded drawings: curate, train, tune by preference; each part goes on where it stopped.

python experiments/sd3_pipeline_embedded/study.py           # about an hour of one core
python experiments/sd3_pipeline_embedded/study.py --draw    # table and curve from the CSV files alone
"""

from __future__ import annotations

import csv
import json
import os
import sys
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.setdefault("REPALIGN_ROOT", str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from figures import COLUMNS, draw  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from pictures import framed, write  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import normalize, pad  # noqa: E402

from callbacks.checkpoint import checkpoints_in  # noqa: E402
from callbacks.pictures import generate, grid_of, save_png  # noqa: E402
from datamodules.curated import read_decisions  # noqa: E402
from repalign.encoders.lite0 import Lite0Features  # noqa: E402
from repalign.folders import write_text  # noqa: E402
from repalign.metrics.features import to_uint8  # noqa: E402
from tasks import curate, train  # noqa: E402
from tasks.check import check_composition  # noqa: E402
from tasks.instantiate import build  # noqa: E402
from tasks.launch import compose  # noqa: E402
from tasks.report_data import read_run  # noqa: E402
from tasks.sample import restored  # noqa: E402

RUNS = Path(os.environ.get("REPALIGN_RUNS", "runs")).resolve() / "sd3_pipeline_embedded"
PICTURES, CURATED, PAIRS = RUNS / "pictures", RUNS / "curated", RUNS / "pairs"
DATA = ("data=image_text_folder", f"data.root={PICTURES}", "data.image_size=64", "data.num_workers=0")
BASE = ("experiment=sd3_embedded", *DATA, f"data.keep={CURATED}", "data.batch_size=64", "data.cache_features=true",
        "name=sd3_pipeline_base", f"run_dir={RUNS}/base", "steps=1200", "callbacks.evaluate.every=400",
        "callbacks.sample_grid.every=400")  # fmt: skip
HELD_OUT = 60  # names of which no pair is made
DRAWN, ASKED = 4, 8  # drawings of a name for pairs; of a held-out name, before and after
GRID = 12  # held-out names of the picture


def main() -> None:
    """Every part whose result is not there yet, then the pictures."""
    if "--draw" not in sys.argv:
        kinds = write(PICTURES, RUNS / "cache")
        curated(kinds)
        base = trained(*BASE)
        pairs()
        tuning = (
            "experiment=sd3_dpo_embedded",
            f"data.root={PAIRS}",
            f"tuning.weights={base}",
            f"run_dir={RUNS}/tuned",
        )
        trained(*tuning)
        measured({"before": BASE, "after": tuning})
    draw(HERE)


def composed(*words: str) -> DictConfig:
    """The composition of a run, as the command line would make it."""
    cfg = compose([*words, f"paths.cache={RUNS}/cache"])
    check_composition(cfg)
    return cfg


def curated(kinds: dict[str, str]) -> None:
    """The list that training reads, with its report; by the kind of picture what was removed, and what was found.

    A copy is found when it or its original is removed: which of the two stays is for the step to say.
    """
    if (CURATED / "manifest.json").is_file() and (HERE / "curation.csv").is_file():
        return
    curate.run(composed("task=curate", *DATA, f"task.output={CURATED}", f"run_dir={RUNS}/curate"))
    step = {one.name: one.step for one in read_decisions(CURATED)}
    rows = []
    for kind in dict.fromkeys(kinds.values()):
        own = [name for name in kinds if kinds[name] == kind]
        original = {name: name.rsplit("_", 1)[0] + "_whole.png" for name in own}
        found: int | str = sum(step[name] is not None or step[original[name]] == "near_duplicates" for name in own)
        if kind in ("whole", "cut"):
            found = ""  # nobody planted them
        removed = [sum(step[name] == by for name in own) for by in ("size", "quality", "nsfw", "near_duplicates")]
        rows.append([kind, len(own), *removed, sum(step[name] is None for name in own), found])
    save("curation.csv", ["kind", "pictures", "size", "quality", "nsfw", "near_duplicates", "kept", "found"], rows)


def trained(*words: str) -> Path:
    """The last checkpoint of a run that has all its steps; it goes on from where it was."""
    cfg = composed(*words)
    done = checkpoints_in(Path(cfg.run_dir))
    if not done or not done[-1].name.endswith(f"{cfg.steps:08d}.ckpt"):
        train.run(cfg)
    return checkpoints_in(Path(cfg.run_dir))[-1]


def names() -> tuple[list[str], list[str]]:
    """Names that pairs are made of, and names held out of that; all were trained on."""
    known = sorted(set(build(composed(*BASE).data, "data").source.captions))
    order = [known[i] for i in np.random.default_rng(1).permutation(len(known))]
    return order[HELD_OUT:], order[:HELD_OUT]


def drawn(words: tuple[str, ...], asked: list[str], seed: int) -> Tensor:
    """Pictures [n, 3, H, W] in [0, 1] by the averaged weights of a run's last checkpoint."""
    _, generator, _ = restored(composed(*words, "task=sample"))
    return torch.cat(list(generate(generator, asked, seed, 64)))


def pairs() -> None:
    """The base's own drawings of the names for pairs: of a name every framed one preferred to every cut one."""
    if (PAIRS / "pairs.jsonl").is_file():
        return
    PAIRS.mkdir(exist_ok=True)
    asked = [name for name in names()[0] for _ in range(DRAWN)]
    pictures = drawn(BASE, asked, seed=1)
    good, lines = framed(pictures), []
    for place, name in enumerate(asked[::DRAWN]):
        own = range(place * DRAWN, (place + 1) * DRAWN)
        for w, l in product((i for i in own if good[i]), (i for i in own if not good[i])):
            lines.append({"preferred": f"{w:04d}.png", "rejected": f"{l:04d}.png", "prompt": name})
    for i in sorted({int(line[which][:4]) for line in lines for which in ("preferred", "rejected")}):
        save_png(to_uint8(pictures[i]), PAIRS / f"{i:04d}.png")
    counts = [len(asked), int(good.sum()), len({line["prompt"] for line in lines}), len(lines)]
    save("pairs.csv", ["drawn", "framed", "names", "pairs"], [counts])
    write_text(PAIRS / "pairs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def measured(runs: dict[str, tuple[str, ...]]) -> None:
    """Held-out names, the same noise before and after: is it framed, and is it recognised? Grids of the first ones."""
    asked = [name for name in names()[1] for _ in range(ASKED)]
    rows: list[list] = []
    for when, words in runs.items():
        pictures = drawn(words, asked, seed=2)
        known = recognised(pictures, asked)
        for place, (name, good, right) in enumerate(zip(asked, framed(pictures), known, strict=True)):
            rows.append([when, name, place % ASKED, int(good), int(right)])
        shown = [row * ASKED + column for row in range(GRID) for column in range(COLUMNS)]
        edged = pad(pictures[shown], (1, 1, 1, 1), value=0.75)  # shows where a picture ends
        save_png(grid_of(edged, COLUMNS), HERE / f"grid_{when}.png")
    save("held_out.csv", ["when", "name", "noise", "framed", "recognised"], rows)
    journal = read_run(RUNS / "tuned").series
    curve = {key: journal[f"train/figure/{key}"] for key in ("margin", "accuracy")}
    steps = curve["margin"].steps
    save("margin.csv", ["step", *curve], list(zip(steps, *(one.values for one in curve.values()), strict=True)))


@torch.no_grad()
def recognised(pictures: Tensor, asked: list[str]) -> Tensor:
    """Whether the nearest of all training pictures, by pooled features of EfficientNet-Lite0, has the name, [n]."""
    source, network = build(composed(*BASE).data, "data").source, Lite0Features()
    true = torch.from_numpy(source.load(range(len(source)))[0]).float() / 255
    near = (normalize(network(pictures)[0], dim=1) @ normalize(network(true)[0], dim=1).T).argmax(1)
    return torch.tensor([source.captions[i] == name for i, name in zip(near.tolist(), asked, strict=True)])


def save(name: str, header: list[str], rows: list[list] | list[tuple]) -> None:
    """A CSV file beside this one, anew."""
    with open(HERE / name, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    main()
