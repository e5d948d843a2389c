"""The documentation keeps pace with the code: links, protocols, groups, recipes, golden kinds, variables."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from tasks.launch import combinations, compose

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "experiments" / "README.md"])
METHODS = (ROOT / "METHODS.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


COMMAND = re.compile(r"^(?:\.venv/bin/)?python run\.py (.+)$", re.MULTILINE)


def commands() -> list[str]:
    """Every command line of run.py in the pages, without comments; the synopsis is none."""
    texts = (page.read_text(encoding="utf-8").replace("\\\n", "") for page in PAGES)
    lines = (re.sub(r"<(\w+)>", r"\1", line.split(" #")[0]) for text in texts for line in COMMAND.findall(text))
    return sorted({" ".join(line.split()) for line in lines if "NAME" not in line and "--" not in line})


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Markdown renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        aim = page.parent / file if file else page
        assert aim.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(aim), f"{page.name}: {target}"


def test_the_site_shows_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in nav, page.name


def rows_of_the_catalogue() -> list[list[str]]:
    rows = METHODS.split("## Parity")[0].split("|---|---|---|---|---|\n")[1].splitlines()
    return [[cell.strip() for cell in row.split("|")] for row in rows if row.startswith("| ")]


def test_every_method_that_is_here_has_its_page():
    here = {row[1] for row in rows_of_the_catalogue() if row[3] != "planned"}
    pages = {page: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert here == {text.partition("\n")[0].removeprefix("# ") for text in pages.values()}
    for page, text in pages.items():
        name = text.partition("\n")[0].removeprefix("# ")
        assert page.stem == re.sub(r"[^a-z0-9]+", "_", name.lower()), page.name
        for part in ("arXiv:", "```math\n", "<!-- numbers -->", "## What differs from the official code"):
            assert part in text, f"{page.name}: {part}"


def test_every_protocol_has_its_section():
    tree = ast.parse((ROOT / "repalign" / "protocols.py").read_text(encoding="utf-8"))
    protocols = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(protocols) == sorted(sections)


def test_every_group_and_task_is_described():
    for group in (path.name for path in (ROOT / "conf").iterdir() if path.is_dir()):
        assert f"| `{group}` |" in CONFIGURATION, group
    for task in (path.stem for path in (ROOT / "conf" / "task").glob("*.yaml")):
        assert f"| `task={task}`" in CONFIGURATION, task


def test_examples_of_groups_exist():
    for group, examples in re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", CONFIGURATION, re.MULTILINE):
        for choice in re.findall(r"`(\w+)`", examples):
            assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"


def test_every_environment_variable_is_described():
    for file in (ROOT / "conf").rglob("*.yaml"):
        for variable in re.findall(r"oc\.env:(\w+)", file.read_text(encoding="utf-8")):
            assert f"`{variable}`" in CONFIGURATION, f"{file.name}: {variable}"


def test_the_catalogue_has_twenty_methods_and_every_recipe():
    rows = rows_of_the_catalogue()
    assert len(rows) == 20
    for row in rows:
        assert "arXiv:" in row[2], row[1]
    recipes = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    described = set(re.findall(r"`(\w+)`", METHODS))
    assert recipes <= described, recipes - described


def test_parity_names_the_golden_kinds_that_are_here():
    cases = (ROOT / "tests" / "golden" / "data").glob("*/case.json")
    kinds = {json.loads(case.read_text(encoding="utf-8"))["kind"] for case in cases}
    table = METHODS.split("## Parity")[1].split("\n## ")[0]
    assert kinds == set(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE))
    catalogue = METHODS.split("## Parity")[0]
    assert kinds == set(re.findall(r"`(\w+\.\w+)`", catalogue))


@pytest.mark.parametrize("line", commands())
def test_command_lines_of_the_pages_compose(line):
    for overrides in combinations(word for word in shlex.split(line) if "=" in word):
        compose(overrides)


def test_families_of_checkpoints_in_the_pages_exist():
    from tasks.convert import AUTOENCODERS, FAMILIES

    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"task\.family=(\w+)", page.read_text(encoding="utf-8"))}
    assert named and named <= {*FAMILIES, *AUTOENCODERS, "lora"}


def test_command_lines_are_found():
    assert len(commands()) > 10
