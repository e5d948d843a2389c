"""MM-DiT, Cross-DiT and a U-Net of the same size on OpenMoji's names: trains what is missing, asks for pictures, draws.

    python experiments/text_to_image_embedded/study.py             # three runs, about an hour of one core
    python experiments/text_to_image_embedded/study.py --draw      # table and pictures from the CSV files alone

A run that was killed goes on from its checkpoint; one that has its rows in the CSV files is not repeated.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("REPALIGN_ROOT", str(ROOT))

import matplotlib as mpl  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch.nn.functional import normalize  # noqa: E402

from callbacks.pictures import Generator, generate, grid_of, save_png  # noqa: E402
from datamodules.openmoji import OpenMoji  # noqa: E402
from repalign.encoders.lite0 import Lite0Features  # noqa: E402
from tasks import train  # noqa: E402
from tasks.check import check_composition  # noqa: E402
from tasks.launch import compose  # noqa: E402
from tasks.report_data import read_run  # noqa: E402
from tasks.sample import restored  # noqa: E402

BACKBONES = {"MM-DiT": "sd3_embedded", "Cross-DiT": "cross_dit_embedded", "U-Net": "ldm_embedded"}
KINDS = ("trained on", "left out", "of no picture")  # the prompts of the recipe, in its order
COLUMNS = 4
RUNS = Path(os.environ.get("REPALIGN_RUNS", "runs")) / "text_to_image_embedded"


def main() -> None:
    """Train, ask, draw."""
    if "--draw" not in sys.argv:
        for name, recipe in BACKBONES.items():
            if name not in {row["backbone"] for row in rows_of("retrieval.csv")}:
                study(name, recipe)
    draw()


def composed(recipe: str, *words: str) -> DictConfig:
    """The composition of a run, as the command line would make it."""
    cfg = compose([f"experiment={recipe}", f"run_dir={RUNS}/{recipe}", *words])
    check_composition(cfg)
    return cfg


def study(name: str, recipe: str) -> None:
    """Train one backbone, keep its scores, its grid and what its pictures are taken for."""
    cfg = composed(recipe)
    train.run(cfg)
    score = read_run(Path(cfg.run_dir)).metrics["fd_lite0"]
    assembly, generator, _ = restored(composed(recipe, "task=sample"))
    size = sum(p.numel() for p in assembly.module.trained["backbone"].parameters())
    prompts = list(cfg.callbacks.sample_grid.prompts)
    asked = [prompt for prompt in prompts for _ in range(COLUMNS)]
    pictures = torch.cat(list(generate(generator, asked, 0, 64)))
    save_png(grid_of(pictures, COLUMNS), HERE / f"grid_{recipe}.png")
    found = retrieval(generator, cfg)
    add(
        "scores.csv",
        ("backbone", "parameters", "step", "fd_lite0"),
        [(name, size, int(s), f"{v:.3f}") for s, v in zip(score.steps, score.values, strict=True)],
    )
    add(
        "retrieval.csv",
        ("backbone", "prompts", "pictures", "of", "first", "first_five"),
        [(name, *row) for row in found],
    )


@torch.no_grad()
def retrieval(generator: Generator, cfg: DictConfig) -> list[tuple[str, int, int, str, str]]:
    """How often the true picture of a prompt is, of all pictures, the nearest to what was drawn for it.

    Nearest by cosine of the pooled features of EfficientNet-Lite0. One drawing for each prompt that was trained on,
    eight for each that was left out.
    """
    whole = OpenMoji(cfg.data.image_size, Path(cfg.data.cache_root), list(cfg.data.groups))
    left_out = list(cfg.data.leave_out)
    captions = list(whole.captions or ())
    network = Lite0Features()
    everything = torch.from_numpy(whole.load(range(len(whole)))[0]).float() / 255
    true = normalize(network(everything)[0], dim=1)
    rows = []
    seen = [caption for caption in captions if caption not in left_out]
    for kind, asked in (("trained on", seen), ("left out", [c for c in left_out for _ in range(8)])):
        drawn = torch.cat(list(generate(generator, asked, 1, 64)))
        near = normalize(network(drawn)[0], dim=1) @ true.T
        order = near.argsort(1, descending=True)
        places = torch.tensor([captions.index(c) for c in asked])
        rank = (order == places[:, None]).int().argmax(1)
        hits = [f"{float((rank < n).float().mean()):.4f}" for n in (1, 5)]
        rows.append((kind, len(asked), len(captions), *hits))
    return rows


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


def draw() -> None:
    """Curve, table and the grid of all backbones side by side, with the prompts."""
    mpl.use("Agg")
    scores, found = rows_of("scores.csv"), rows_of("retrieval.csv")
    names = [name for name in BACKBONES if name in {row["backbone"] for row in scores}]
    figure, axes = plt.subplots(figsize=(5.2, 3.4), constrained_layout=True)
    lines = []
    for name in names:
        own = [row for row in scores if row["backbone"] == name]
        axes.plot([int(r["step"]) for r in own], [float(r["fd_lite0"]) for r in own], marker="o", label=name)
        of = {row["prompts"]: row for row in found if row["backbone"] == name}
        hits = [f"{100 * float(of[k][n]):.0f} %" for k in KINDS[:2] for n in ("first", "first_five")]
        lines.append([name, f"{int(own[0]['parameters']) / 1e6:.2f} M", f"{float(own[-1]['fd_lite0']):.1f}", *hits])
    axes.set_xlabel("step")
    axes.set_ylabel("fd_lite0")
    axes.legend()
    figure.savefig(HERE / "curve.png", dpi=120)
    header = [
        "backbone",
        "parameters",
        "fd_lite0",
        "seen: first",
        "seen: first five",
        "left out: first",
        "left out: first five",
    ]
    table = [header, ["---"] * len(header), *lines]
    (HERE / "table.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in table))
    side_by_side(names)


def side_by_side(names: list[str]) -> None:
    """Prompts on the left, a block of pictures for each backbone."""
    cfg = composed("sd3_embedded")
    prompts, left_out = list(cfg.callbacks.sample_grid.prompts), list(cfg.data.leave_out)
    last = max(prompts.index(name) for name in left_out)
    grids = [Image.open(HERE / f"grid_{BACKBONES[name]}.png").convert("RGB") for name in names]
    row, top, left = grids[0].height / len(prompts), 22, 250
    sheet = Image.new("RGB", (left + sum(g.width + 12 for g in grids), top + grids[0].height), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for place, (name, grid) in enumerate(zip(names, grids, strict=True)):
        x = left + place * (grid.width + 12)
        ink.text((x + 4, 2), name, "black", font)
        sheet.paste(grid, (x, top))
    for place, prompt in enumerate(prompts):
        colour = "#1f4fbf" if prompt in left_out else "black" if place < last else "#b3261e"
        ink.text((4, top + row * (place + 0.35)), prompt, colour, font)
    sheet.quantize(128).save(HERE / "grid.png", optimize=True)


if __name__ == "__main__":
    main()
