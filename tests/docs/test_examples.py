"""The code in the documentation runs, top to bottom, one namespace per page."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Every python block of a page with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page):
    torch.manual_seed(0)
    names = {"__name__": page.stem}
    for line, source in blocks_of(page):
        # Blank lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * line + source, str(page), "exec"), names)


def test_pages_with_examples_are_found():
    assert {"concepts.md", "api.md"} <= {page.name for page in PAGES if blocks_of(page)}
