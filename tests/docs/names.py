"""The names that ``docs/dashboards.md`` describes."""

import re
from pathlib import Path

NAMESPACES = ("train", "eval", "grids", "throughput", "system")
PAGE = Path(__file__).parents[2] / "docs" / "dashboards.md"


def described() -> list[re.Pattern]:
    """A pattern for every name in the first column of the table."""
    table = PAGE.read_text(encoding="utf-8").partition("## Names")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return [re.compile(re.sub(r"<\w+>", r"\\w+", name)) for name in names]


def undescribed(names) -> list[str]:
    """Logged names outside the namespaces, or that the page does not tell."""
    patterns = described()
    return sorted(
        name
        for name in set(names)
        if name.partition("/")[0] not in NAMESPACES or not any(pattern.fullmatch(name) for pattern in patterns)
    )
