"""What a check found, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

FINE, LOOK, WRONG = "fine", "look", "wrong"
_COLOURS = {FINE: "green", LOOK: "yellow", WRONG: "red"}


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        check: what was looked at.
        state: ``fine``; ``look``, which may be meant so; ``wrong``.
        found: what was seen, in words.
        mend: what to do about it; empty when it is fine.
    """

    check: str
    state: str
    found: str
    mend: str = ""


def show(title: str, findings: Sequence[Finding]) -> None:
    """A table of all findings, then what to do about those that are not fine."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for head in ("check", "state", "found"):
        table.add_column(head, overflow="fold")
    for finding in findings:
        table.add_row(finding.check, Text(finding.state, style=_COLOURS[finding.state]), Text(finding.found))
    console = Console()
    console.print(table)
    for finding in findings:
        if finding.state != FINE:
            console.print(Text(f"{finding.state}: {finding.check}: {finding.found}: {finding.mend}"), soft_wrap=True)
