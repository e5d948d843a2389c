"""Lines that each method added: of files and classes that nothing but the method needs. Run from the project's root.

python experiments/method_lines/count.py --write
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# A file, or classes and functions of one. A method's modules, configuration and recipes are found by their names.
CORE = {
    "sra": [
        "repalign/aligners/teacher.py",
        "repalign/aligners/weights.py",
        "repalign/aligners/similarities.py::ChannelCosine,SmoothL1,L1,L2",
        "repalign/aligners/heads.py::TwoLayerHead",
        "repalign/paths/earlier.py",
        "repalign/paths/tokens.py",
        "repalign/objectives/dual_timestep.py",
        "repalign/nn/attention.py::same_group",
    ],
    "layer_sync": ["repalign/aligners/self_target.py", "repalign/aligners/heads.py::no_head"],
    "deepflow": [
        "repalign/backbones/deepflow.py",
        "repalign/nn/vera.py",
        "repalign/nn/patch_head.py",
        "repalign/objectives/deepflow.py",
        "repalign/paths/time.py::Ladder",
    ],
    "reg": ["repalign/nn/stream_io.py::PatchAndClassIO", "repalign/encoders/streams.py::ClassToken"],
    "redi": [
        "repalign/encoders/pca.py",
        "repalign/encoders/streams.py::PCAFeatures",
        "repalign/nn/stream_io.py::ChannelIO,SeparateIO",
        "repalign/objectives/streams.py::StreamDropout",
        "repalign/guidance/representation.py",
    ],
    "u_repa": ["repalign/backbones/sit_down.py", "repalign/nn/resample.py", "repalign/aligners/manifold.py"],
    "ddt": [
        "repalign/backbones/ddt.py",
        "repalign/backbones/improved_dit.py",
        "repalign/nn/improved.py",
        "repalign/nn/rotary.py",
        "repalign/aligners/targets.py::BilinearTarget",
        "repalign/aligners/similarities.py::CosineDistance",
        "repalign/objectives/weighting.py::RatioWeight,InverseVarianceWeight",
        "repalign/samplers/multistep.py",
        "repalign/samplers/refresh.py",
        "repalign/samplers/similarity.py",
        "repalign/samplers/stochastic_heun.py",
    ],
}
TASKS = {"redi": ["tasks/fit_pca.py"], "ddt": ["tasks/sharing.py"], "layer_sync": ["tasks/convert_lora.py"]}
OBJECTS = {  # of conf/, recipes aside
    "sra": ["aligner/sra*", "objective/dual_timestep", "method/sra"],
    "layer_sync": ["aligner/layer_sync", "method/layer_sync"],
    "deepflow": ["backbone/deepflow*", "objective/deepflow", "time_sampler/ladder", "method/deepflow"],
    "reg": ["streams/class_token", "token_io/patch_and_class", "guidance/cfg_with_class_token", "method/reg"],
    "redi": [
        "streams/pca_features", "token_io/channels", "token_io/separate", "pca/*", "objective/streams_with_dropout",
        "guidance/representation", "guidance/cfg_latent_only", "method/redi", "task/fit_pca",
    ],
    "u_repa": ["backbone/sit_down*", "aligner/u_repa", "method/u_repa"],
    "ddt": [
        "backbone/ddt*", "backbone/improved_dit*", "aligner/ddt", "sampler/ddt*", "sampler/multistep*", "guidance/ddt",
        "sweep/ddt*", "method/ddt", "task/sharing",
    ],
}  # fmt: skip
RECIPES = {"layer_sync": "*layer_sync_*", "deepflow": "*deepflow_*"}
COLUMNS = ("core", "its docstrings", "importer", "module", "tasks", "objects in conf", "recipes")


def code_lines(source: str, names: Iterable[str] = ()) -> tuple[int, int]:
    """Lines with code, and lines of docstrings; blank lines and comments count as neither."""
    tree = ast.parse(source)
    nodes = [node for node in tree.body if not names or getattr(node, "name", None) in names]
    if names and len(nodes) != len(set(names)):
        raise KeyError(f"of {', '.join(names)} only {len(nodes)} are there")
    spans = {line for node in nodes for line in range(node.lineno, (node.end_lineno or 0) + 1)} if names else None
    texts = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            first = node.body[0]
            texts |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    if spans is not None:
        lines, texts = lines & spans, texts & spans
    return len(lines - texts), len(texts)


def python_lines(entries: Iterable[str]) -> tuple[int, int]:
    """Code and docstring lines of several entries of ``CORE``."""
    found = []
    for entry in entries:
        file, _, names = entry.partition("::")
        found.append(code_lines((ROOT / file).read_text(), names.split(",") if names else ()))
    return sum(code for code, _ in found), sum(text for _, text in found)


def yaml_lines(patterns: Iterable[str]) -> int:
    """Lines of YAML files that are no comment and not blank."""
    files = {file for pattern in patterns for file in (ROOT / "conf").glob(f"{pattern}.yaml")}
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def row(method: str) -> list[int]:
    """The numbers of one method, in the order of ``COLUMNS``."""
    core, texts = python_lines(CORE[method])
    importer = ROOT / "repalign" / "checkpoints" / f"{method}.py"
    return [
        core,
        texts,
        code_lines(importer.read_text())[0] if importer.exists() else 0,
        code_lines((ROOT / "lightning_modules" / f"{method}.py").read_text())[0],
        python_lines(TASKS.get(method, []))[0],
        yaml_lines(OBJECTS[method]),
        yaml_lines([f"experiment/{RECIPES.get(method, f'{method}_*')}"]),
    ]


def table() -> str:
    """A Markdown table, one row a method."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    lines += [f"| `{method}` | {' | '.join(map(str, row(method)))} |" for method in CORE]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write table.md")
    if parser.parse_args().write:
        (HERE / "table.md").write_text(table() + "\n")
    print(table())
