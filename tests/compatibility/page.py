"""The matrix as a page of the documentation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.compatibility.matrix import BRINGS, GROUPS, Result, architectures, combination, options, result

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
COMMAND = "python -m tests.compatibility"
TITLES = {
    "backbone": "Backbones",
    "token_io": "Token ios",
    "objective": "Objectives",
    "aligner": "Aligners",
}
Look = Callable[[Mapping[str, str]], Result]


def of(chosen: Mapping[str, str]) -> Result:
    """The result of a combination, trained at most once."""
    return result(tuple(sorted(chosen.items())))


def render(look: Look = of) -> str:
    """The whole page."""
    notes: dict[str, int] = {}
    tables, ran, cells = [], 0, 0
    for first, second in itertools.combinations(GROUPS, 2):
        columns = options(second)
        lines = [
            f"## {TITLES[first]} and {TITLES[second].lower()}",
            "",
            f"| {first} | " + " | ".join(f"`{name}`" for name in columns) + " |",
            "|---|" + "---|" * len(columns),
        ]
        for row in options(first):
            marks = []
            for column in columns:
                found = look(combination({first: row, second: column}))
                marks.append(mark(found, notes))
                ran, cells = ran + (found.refusal is None), cells + 1
            lines.append(f"| `{row}` | " + " | ".join(marks) + " |")
        tables.append("\n".join(lines))
    head = HEAD.format(ran=ran, cells=cells, command=COMMAND, backbones=_backbones(), brings=_brings())
    listed = "\n".join(f"{number}. {text}" for text, number in notes.items())
    return "\n\n".join([head, *tables, f"## Notes\n\n{listed}"]) + "\n"


def mark(found: Result, notes: dict[str, int]) -> str:
    """One cell: ``runs``, with the number of a note where weights stay idle; or the number of the refusal alone."""
    if found.refusal is not None:
        return f"[{_number(_plain(found.refusal), notes)}](#notes)"
    if not found.idle:
        return "runs"
    number = _number(f"Runs, but no loss trains these parts of the backbone: {', '.join(found.idle)}.", notes)
    return f"runs [{number}](#notes)"


def _number(text: str, notes: dict[str, int]) -> int:
    return notes.setdefault(text, len(notes) + 1)


def _plain(line: str) -> str:
    """A refusal as Markdown text, its asterisks kept."""
    return "`error: " + line.replace("`", "'") + "`"


def _backbones() -> str:
    return "\n".join(
        f"- `{kind}`: {', '.join(f'`{name}`' for name in names)}" for kind, names in architectures().items()
    )


def _brings() -> str:
    def words(brought: Mapping[str, str]) -> str:
        return " ".join(f"{group}={choice}" for group, choice in brought.items())

    return "\n".join(f"- `{group}={choice}`: `{words(brought)}`" for (group, choice), brought in BRINGS.items())


HEAD = """# Compatibility

Which choices of `backbone`, `token_io`, `objective` and `aligner` go together. A test writes this page (`{command}`
writes it anew): every cell was composed from `conf/` with `debug=tiny` and the base method, checked and built as
`run.py` does, and trained for one step. All losses and gradients were finite, and gradients reached the backbone and
every weight of an aligner's head. **{ran} of {cells} cells run.** The others are refused before anything heavy begins,
by one line that names the two parts and why; the number leads to it. That a cell runs says nothing about how well it
trains.

A cell is a pair. The two other groups have their base choice (`token_io=patch`, `objective=denoising`, `aligner=none`,
the backbone SiT) or what the pair brings along, below. Taps are the backbone's first and last hidden state on its
finest grid; U-REPA's is the last one on its coarsest. Aligners add up (`aligner=[repa,layer_sync]`): each is one more
term.

One row stands for all sizes of an architecture:

{backbones}

What a choice brings along:

{brings}"""
