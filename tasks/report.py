"""task=report: one HTML file that shows a run, or compares the runs below a folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig

from repalign.errors import UserError, unknown_choice
from repalign.folders import write_text
from tasks.report_data import RunFolder, is_run, read_run
from tasks.report_files import write_files
from tasks.report_leaderboard import metrics_of, sweep_page
from tasks.report_pages import run_page
from tasks.report_sweep import runs_below

TEMPLATES = Path(__file__).parent / "templates"


def run(cfg: DictConfig) -> None:
    """Write the report of ``task.folder``.

    Raises:
        UserError: when there is no run in the folder.
    """
    output = None if cfg.task.output is None else Path(cfg.task.output)
    print(f"wrote {write_report(Path(cfg.task.folder), output, cfg.task.get('sort'))}", flush=True)


def write_report(folder: Path, output: Path | None = None, sort: str | None = None) -> Path:
    """Write a self-contained page: styles, curves and pictures inside, no script, no network.

    Of a folder of runs also ``sweep.csv``, ``sweep.md`` and ``sweep.png``, beside the page.

    Args:
        folder: a run folder, or a folder with run folders below it.
        output: the file; ``report.html`` in the folder when None.
        sort: the score that decides the order of several runs; the first that they have when None.

    Returns:
        The file.

    Raises:
        UserError: when the folder is missing or holds no run, or none of its runs has the score.
    """
    if not folder.is_dir():
        raise UserError(f"task.folder: no folder '{folder}'; give a run folder or a folder of run folders")
    runs: list[RunFolder] = []
    try:
        if is_run(folder):
            page = render("run.html", run_page(read_run(folder)))
        else:
            runs = runs_below(folder)
            if not runs:
                raise UserError(f"task.folder: no run below '{folder}' (looked for metrics.csv, config.yaml, run.json)")
            sort = _score_to_sort_by(runs, sort)
            page = render("sweep.html", sweep_page(runs, folder, sort))
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, SyntaxError, OSError) as error:
        # The folder is another's: a file of it is what it should be by name and not by content.
        raise UserError(f"task.folder: '{folder}' holds no run as this project writes it ({error!r})") from error
    target = output or folder / "report.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    if runs:
        write_files(runs, target.parent, sort)
    write_text(target, page)
    return target


def _score_to_sort_by(runs: Sequence[RunFolder], asked: str | None) -> str | None:
    known = metrics_of(runs, None)
    if asked is not None and asked not in known:
        raise unknown_choice("task.sort", asked, known, "score")
    return asked or next(iter(known), None)


def render(template: str, values: dict[str, Any]) -> str:
    """Fill a template; everything that comes from a run is escaped."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return environment.get_template(template).render(**values, style=style, written=written)
