"""What the site adds to the pages: method tables from METHODS.md, a page per protocol, API pages, equations as MathML.

Nothing that these steps write is typed anywhere else; every page in ``docs/`` also reads as it is.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- numbers -->"  # on a method's page: its recipes, parity and measurements go here
# Groups of conf/ whose choices keep a protocol.
GROUPS = {
    "Backbone": "backbone",
    "TokenIO": "token_io",
    "Path": "path",
    "Parametrization": "parametrization",
    "TimeSampler": "time_sampler",
    "Objective": "objective",
    "Encoder": "encoder",
    "TextEncoder": "text_encoder",
    "StreamSource": "streams",
    "LatentNorm": "latent_norm",
    "Autoencoder": "autoencoder",
    "Conditioner": "conditioner",
    "Aligner": "aligner",
    "Guidance": "guidance",
    "Sampler": "sampler",
    "Metric": "metric",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Equations, and the pages that are made here in the navigation."""
    fence = {"name": "math", "class": "math", "format": mathml}
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    made = {
        "concepts.md": [{name: uri} for name, uri in concept_pages()],
        "methods.md": [{row["name"]: uri} for row in methods() if (uri := method_page(row["name"]))],
        "api.md": [{name: uri} for name, uri in api_pages()],
    }
    nav: list[Any] = []
    for entry in config["nav"]:
        ((title, uri),) = entry.items()
        nav.append({title: [{"Overview": uri}, *made[uri]]} if uri in made else entry)
    config["nav"] = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages that are written elsewhere in the repository, or follow from it."""
    outside = {"methods.md": "METHODS.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
    for uri, name in outside.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=from_docs(text)))
    sections = dict(concept_sections())
    for name, uri in concept_pages():
        files.append(File.generated(config, uri, content=concept_page(name, sections)))
    for name, uri in api_pages():
        files.append(File.generated(config, uri, content=api_page(name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in a method's tables; of the page of all protocols leave the rules, for each has a page of its own here."""
    uri = page.file.src_uri
    if uri == "concepts.md":
        pages = [
            f"- [{name}]({uri}): {first_sentence(dict(concept_sections())[name])}" for name, uri in concept_pages()
        ]
        intro = markdown.split("\n## ")[0].replace("# Concepts: one section per protocol", "# Concepts")
        return intro + "\n\n" + "\n".join(pages)
    if MARK in markdown:
        row = next(row for row in methods() if method_page(row["name"]) == uri)
        markdown = markdown.replace(MARK, numbers_of(row))
    up = "../" * uri.count("/")
    markdown = re.sub(rf"\]\({re.escape(up)}concepts\.md#(\w+)\)", rf"]({up}concepts/\1.md)", markdown)
    return re.sub(r"\]\((?:\.\./)+(METHODS|CONTRIBUTING|CHANGELOG)\.md", lambda m: f"]({up}{m[1].lower()}.md", markdown)


def mathml(source: str, language: str, css_class: str, options: Any, md: Any, **_: Any) -> str:
    """Equations of a ``math`` block, one a line, as MathML: no script, no font from elsewhere."""
    return "".join(f'<div class="{css_class}">{convert(line, display="block")}</div>' for line in source.splitlines())


# Methods


def methods() -> list[dict[str, str]]:
    """The rows of METHODS.md's first table."""
    text = (ROOT / "METHODS.md").read_text(encoding="utf-8").split("## Parity")[0]
    keys = ("name", "paper", "recipes", "parity", "measured")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "arXiv" in line]
    return [dict(zip(keys, (cell.strip(" |") for cell in [*row, "", ""]), strict=False)) for row in rows]


def method_page(name: str) -> str:
    """The page of a method, '' while it is planned."""
    uri = f"methods/{re.sub(r'[^a-z0-9]+', '_', name.lower())}.md"
    return uri if (ROOT / "docs" / uri).is_file() else ""


def numbers_of(row: dict[str, str]) -> str:
    """Recipes with the figures they should reach, parity with the official code, and what was measured here."""
    recipes = [name for name in names_in(row["recipes"]) if (ROOT / f"conf/experiment/{name}.yaml").is_file()]
    lines = ["## Recipes", "", "| `experiment=` | row of the paper | figures there |", "|---|---|---|"]
    lines += [recipe_line(name) for name in recipes]
    kinds = set(names_in(row["parity"], r"`(\w+\.\w+)`"))
    lines += ["", "## Parity", "", "The worst difference over all outputs of all cases, on a CPU (`make golden`).", ""]
    lines += ["| kind | worst absolute | worst relative | what is compared |", "|---|---|---|---|"]
    for line in (ROOT / "METHODS.md").read_text(encoding="utf-8").split("## Parity")[1].splitlines():
        kind = re.match(r"\| `(\w+\.\w+)` \| (.*)", line)
        if kind and kind[1] in kinds:
            lines.append(f"| `{kind[1]}` | {kind[2]}")
    return "\n".join([*lines, "", "## Numbers", "", f"{row['measured'].capitalize()}."])


def recipe_line(name: str) -> str:
    """A recipe with the row of the paper that it is of, and the paper's figures."""
    cfg = yaml.safe_load((ROOT / f"conf/experiment/{name}.yaml").read_text(encoding="utf-8"))
    told = dict(cfg.get("reference") or {})
    paper, row = told.pop("paper", ""), told.pop("row", "")
    figures = ", ".join(f"{key} {value}" for key, value in told.items() if isinstance(value, int | float))
    return f"| `{name}` | {row or paper or '-'} | {figures or '-'} |"


def names_in(cell: str, pattern: str = r"`(\w+)`") -> list[str]:
    """Names in backticks."""
    return re.findall(pattern, cell)


# Protocols


def concept_sections() -> Iterator[tuple[str, str]]:
    """Protocol and text of each section of ``concepts.md``, in its order."""
    for part in (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        yield title, text.strip()


def concept_pages() -> list[tuple[str, str]]:
    """Protocol and page, in the order of ``concepts.md``."""
    return [(name, f"concepts/{name.lower()}.md") for name, _ in concept_sections()]


def concept_page(name: str, sections: dict[str, str]) -> str:
    """A protocol: what it is, an example, its definition, and the choices that keep it."""
    text = re.sub(r"\]\((?!\w+://|#)", "](../", sections[name])
    earlier = ", ".join(f"[{other}]({other.lower()}.md)" for other in earlier_names(name, sections))
    note = f"\n\nThe example goes on from: {earlier}.\n" if earlier else ""
    parts = [f"# {name}", text + note, "## Definition", f"`repalign.protocols.{name}`:", definition(name)]
    if group := GROUPS.get(name):
        parts += ["## Choices", f"What `{group}=` of the command line chooses from.", choices_table(group)]
    return "\n\n".join(parts)


def earlier_names(name: str, sections: dict[str, str]) -> list[str]:
    """The sections whose examples define names that this one's reads, in order."""
    defined: dict[str, str] = {}
    for other, text in sections.items():
        trees = [ast.parse(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        if other == name:
            # Imported or assigned at this page's own top, before or after: only what is read first counts.
            own = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} - set(defined)
            read = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - own
            found = {defined[n] for n in read if n in defined}
            return [section for section in sections if section in found]
        for node in nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.setdefault(node.id, other)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    defined.setdefault(alias.asname or alias.name, other)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.setdefault(node.name, other)
    return []


def definition(name: str) -> str:
    """A protocol as it stands in the code, comments included."""
    source = (ROOT / "repalign" / "protocols.py").read_text(encoding="utf-8")
    node = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    return f"```python\n{ast.get_source_segment(source, node)}\n```"


def choices_table(group: str) -> str:
    """The choices of a group: name, class with a link, and what the file or else the class says of itself."""
    lines = ["| choice | class | what it is |", "|---|---|---|"]
    for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
        target = target_of(file)
        words = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        said = next((line for line in words if not line.startswith("@package")), "") or docstring_of(target)
        link = f"[`{target.rpartition('.')[2]}`][{target}]" if docstring_of(target) else "-"
        lines.append(f"| `{file.stem}` | {link} | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def target_of(file: Path) -> str:
    """The class that a choice builds: its own, or that of the choice it goes out from."""
    node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    if "_target_" in node:
        return str(node["_target_"])
    above = [name for name in node.get("defaults", []) if isinstance(name, str) and name != "_self_"]
    return target_of(file.with_name(f"{above[0]}.yaml")) if above else ""


def docstring_of(target: str) -> str:
    """The first line of a class's or function's docstring; '' where it is defined elsewhere."""
    module, _, name = target.rpartition(".")
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not module or not file.is_file():
        return ""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def first_sentence(text: str) -> str:
    """The first sentence of a section, on one line."""
    return " ".join(re.split(r"(?<=[.:]) |\n\n", text)[0].split()).rstrip(":.") + "."


# API


def api_pages() -> list[tuple[str, str]]:
    """Package and page."""
    packages = sorted(file.parent.name for file in (ROOT / "repalign").glob("*/__init__.py"))
    return [(f"repalign.{name}", f"api/{name}.md") for name in packages] + [("Methods", "api/methods.md")]


def api_page(name: str) -> str:
    """Every module of a package; of the methods, their doors."""
    package = name if name.startswith("repalign") else "lightning_modules"
    files = sorted((ROOT / package.replace(".", "/")).glob("*.py"))
    modules = [f"::: {package}.{file.stem}" for file in files if file.stem != "__init__"]
    return "\n\n".join([f"# {name}", *modules])


def from_docs(text: str) -> str:
    """A page from the top of the repository, its links as seen from ``docs/``."""
    return text.replace("](docs/", "](")
