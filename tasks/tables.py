"""Tables on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table; names in a first column stand on the left, numbers on the right."""
    table = Table(title=title)
    for head in heads:
        table.add_column(head, justify="left" if head == "recipe" else "right")
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
