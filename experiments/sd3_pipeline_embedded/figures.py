"""Table and pictures of this study, from its CSV files and grids."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Rows = list[dict[str, str]]
COLUMNS = 4  # noises of a row of the grids


def draw(folder: Path) -> None:
    """``table.md``, ``margin.png``, and ``grid.png`` where the run has left its two grids."""
    mpl.use("Agg")
    held_out = rows_of(folder / "held_out.csv")
    table = [["held-out names", "before", "after"], ["---"] * 3]
    for key in ("framed", "recognised"):
        table.append([key, *(spread(held_out, when, key) for when in ("before", "after"))])
    table.append(["preferred, where the two differ", "", preference(held_out)])
    (folder / "table.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in table))
    curve(rows_of(folder / "margin.csv"), folder / "margin.png")
    if (folder / "grid_before.png").is_file() and (folder / "grid_after.png").is_file():  # of the run, not in git
        before_and_after(folder, list(dict.fromkeys(row["name"] for row in held_out)))


def rows_of(path: Path) -> Rows:
    """A CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def by_name(rows: Rows, when: str, key: str) -> np.ndarray:
    """Values [names, noises]."""
    own = [row for row in rows if row["when"] == when]
    noises = len({row["noise"] for row in own})
    return np.array([float(row[key]) for row in own]).reshape(-1, noises)


def interval(draws: np.ndarray) -> str:
    """The middle 95 %, in per cent."""
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return f"({100 * low:.0f}-{100 * high:.0f})"


def resampled(count: int) -> np.ndarray:
    """Names drawn with replacement, [2000, count]."""
    return np.random.default_rng(0).integers(0, count, (2000, count))


def spread(rows: Rows, when: str, key: str) -> str:
    """Share in per cent with its 95 % interval over names."""
    of_name = by_name(rows, when, key).mean(1)
    return f"{100 * of_name.mean():.0f} % {interval(of_name[resampled(len(of_name))].mean(1))}"


def preference(rows: Rows) -> str:
    """Of drawings from one noise of which one is framed, how often it is the later one; 95 % interval over names."""
    before, after = (by_name(rows, when, "framed") for when in ("before", "after"))
    won, lost = ((after > before).sum(1), (after < before).sum(1))
    again = resampled(len(won))
    with np.errstate(invalid="ignore"):
        draws = won[again].sum(1) / (won + lost)[again].sum(1)
    return f"{100 * won.sum() / (won + lost).sum():.0f} % {interval(draws)} of {(won + lost).sum()}"


def curve(rows: Rows, path: Path) -> None:
    """Margin and accuracy of the pairs in training against updates."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.8), constrained_layout=True)
    steps = [int(row["step"]) for row in rows]
    for one, key in zip(axes, ("margin", "accuracy"), strict=True):
        one.plot(steps, [float(row[key]) for row in rows])
        one.set_xlabel("step")
        one.set_title(key)
    axes[1].axhline(0.5, color="grey", lw=0.8)
    figure.savefig(path, dpi=120)


def before_and_after(folder: Path, names: list[str]) -> None:
    """Held-out names on the left, drawings before and after from the same noises."""
    grids = [Image.open(folder / f"grid_{when}.png").convert("RGB") for when in ("before", "after")]
    top, left, gap = 22, 230, 16
    size = (left + sum(grid.width + gap for grid in grids), top + grids[0].height)
    sheet = Image.new("RGB", size, "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    height = grids[0].height / round(grids[0].height / grids[0].width * COLUMNS)
    for place, (when, grid) in enumerate(zip(("before", "after"), grids, strict=True)):
        x = left + place * (grid.width + gap)
        ink.text((x + 4, 2), when, "black", font)
        sheet.paste(grid, (x, top))
    for place in range(round(grids[0].height / height)):
        lines = textwrap.wrap(names[place], 30)
        ink.multiline_text((4, top + height * (place + 0.4) - 8 * len(lines)), "\n".join(lines), "black", font)
    sheet.quantize(128).save(folder / "grid.png", optimize=True)
