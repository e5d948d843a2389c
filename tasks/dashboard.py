"""task=dashboard: a W&B workspace that tracks the scores of a sweep, made by one command."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from repalign.errors import UserError, unknown_choice
from repalign.folders import write_text
from tasks.report_data import RunFolder, higher_is_better, is_run, read_run
from tasks.report_sweep import runs_below, variants_of
from tasks.resolvers import group

STEP = "trainer/global_step"  # Lightning's name in W&B for the step at which something was logged
STEERING = ("train/lr", "train/grad_norm", "train/skipped_steps")
GRIDS = {"SampleGrid": ("grids/ema", "grids/raw"), "ReconstructionGrid": ("grids/reconstructions",)}
TABLES = {"SampleGrid": "grids/samples"}
_FIRST = ("fid", "is", "fd", "sfid", "kid")  # scores that come first
_NO_PACKAGE = "task=dashboard: wandb-workspaces is not installed; pip install 'repalign[dashboard]'"


def run(cfg: DictConfig) -> None:
    """Write the description of the workspace beside the runs; with an account, make the workspace too.

    Raises:
        UserError: one line when the package is missing, no run was logged to W&B, no run has the score, or W&B refuses.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError(_NO_PACKAGE)
    folder = Path(cfg.task.folder)
    runs = logged_runs(folder)
    made = workspace(runs, str(cfg.task.project), cfg.task.entity, cfg.task.title or folder.name, cfg.task.sort)
    file = Path(cfg.task.output) if cfg.task.output else folder / "dashboard.json"
    write_text(file, json.dumps(described(made), indent=1) + "\n")
    if not has_account():
        print(
            f"no W&B account on this machine: wrote the workspace's description to {file}; after `wandb login` the "
            "same command makes the workspace",
            flush=True,
        )
        return
    print(f"{save(made)} ({file} describes it)", flush=True)


def logged_runs(folder: Path) -> list[RunFolder]:
    """The runs of a folder that were logged to W&B.

    Raises:
        UserError: when there is none.
    """
    if not folder.is_dir():
        raise UserError(f"task.folder: no folder '{folder}'; give a run folder or a folder of run folders")
    runs = [read_run(folder)] if is_run(folder) else runs_below(folder)
    found = [run for run in runs if "wandb" in (run.config.get("logger") or {}) and run.series]
    if not found:
        raise UserError(
            f"task.folder: of {len(runs)} runs in '{folder}' none has logged to W&B; train with logger=wandb, or look "
            "at them with task=report"
        )
    return found


def has_account() -> bool:
    """Whether this machine has credentials of W&B; nobody is asked to type them."""
    import wandb

    return bool(wandb.login(prompt=False))


def save(made: Any) -> str:
    """Make the workspace; its address.

    Raises:
        UserError: when W&B refuses, or cannot be reached.
    """
    import wandb

    try:
        if not made.entity:
            made.entity = wandb.Api().default_entity
        made.save()
    except Exception as error:  # of the network, of the server, of the account: to the person they are one
        text = " ".join(str(error).split())[:200]
        raise UserError(f"task=dashboard: W&B did not take the workspace ({type(error).__name__}: {text})") from error
    return str(made.url)


def described(made: Any) -> dict[str, Any]:
    """The workspace as W&B takes it, as plain values."""
    return made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def keys_of(runs: Sequence[RunFolder]) -> list[str]:
    """Every name that the runs have logged, pictures and tables included."""
    keys = list(dict.fromkeys(name for run in runs for name in run.series))
    for run in runs:
        grid = str(((run.config.get("callbacks") or {}).get("sample_grid") or {}).get("_target_", ""))
        kind = grid.rpartition(".")[2]
        if run.grids and kind in GRIDS:
            keys += [*GRIDS[kind], *([TABLES[kind]] if kind in TABLES else [])]
    return list(dict.fromkeys(keys))


def scores_of(keys: Sequence[str], sort: str | None) -> list[str]:
    """The scores among logged names: the one to sort by first, then FID and IS, then the others.

    Raises:
        UserError: when the one to sort by was not logged.
    """
    own = [key.removeprefix("eval/") for key in keys if key.startswith("eval/") and key.count("/") == 1]
    own = [name for name in own if not name.endswith(("_std", "_ci95"))]
    if sort is not None and sort not in own:
        raise unknown_choice("task.sort", sort, own, "score")
    families = {family: place for place, family in enumerate(_FIRST)}
    return sorted(own, key=lambda name: (name != sort, families.get(name.split("_")[0], len(families))))


def workspace(runs: Sequence[RunFolder], project: str, entity: str | None, title: str, sort: str | None) -> Any:
    """The workspace: scores against steps and cost, pictures, losses, throughput, system; the best run first.

    Args:
        runs: that were logged; a panel shows only what at least one of them has logged.
        project: of W&B.
        entity: of W&B; None for the account's own.
        title: of the workspace.
        sort: score that decides the order; None for the first of FID, IS and the others.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package still declares validators the old way of pydantic
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr

    keys = keys_of(runs)
    scores = scores_of(keys, sort)
    lines = lambda names: [wr.LinePlot(title=name, x=STEP, y=[name]) for name in names]  # noqa: E731
    panels: dict[str, list[Any]] = {
        "Scores": [
            wr.LinePlot(title=f"{name} ({_better(name)} is better)", x=STEP, y=[f"eval/{name}"]) for name in scores
        ],
        "Scores against cost": [
            wr.LinePlot(title=f"{name} against {words}", x=cost, y=[f"eval/{name}"], title_x=words)
            for name in scores[:2]
            for cost, words in (("eval/cost/device_hours", "device-hours"), ("eval/cost/flops", "FLOPs"))
            if cost in keys
        ],
        "Last scores": [wr.BarPlot(title=name, metrics=[f"eval/{name}"]) for name in scores[:4]],
        "Evaluation of checkpoints": lines(k for k in keys if k.startswith("eval/checkpoint/") and not _spread(k)),
        "Samples": [
            *(wr.MediaBrowser(title=key, media_keys=[key]) for names in GRIDS.values() for key in names if key in keys),
            *(wr.WeavePanelSummaryTable(table_name=key) for key in TABLES.values() if key in keys),
        ],
        "Losses": lines(key for key in keys if key.startswith("train/") and not key.startswith(STEERING)),
        "Steering": lines(key for key in keys if key.startswith(STEERING)),
        "Throughput": lines(key for key in keys if key.startswith("throughput/")),
        "System": lines(key for key in keys if key.startswith("system/")),
    }
    groups = list(dict.fromkeys(_group_of(run) for run in runs))
    several = any(len(variant.runs) > 1 for variant in variants_of(runs))
    first = scores[:1]
    return ws.Workspace(
        name=title,
        entity=entity or "",
        project=project,
        sections=[
            ws.Section(name=name, panels=own, is_open=name in ("Scores", "Scores against cost", "Samples"))
            for name, own in panels.items()
            if own
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(expr.Metric("Group").isin(groups)),
            groupby=[expr.Config("variant")] if several else [],
            order=[expr.Ordering(expr.Summary(f"eval/{n}"), ascending=not higher_is_better(n)) for n in first]
            or [expr.Ordering(expr.Metric("CreatedTimestamp"), ascending=False)],
            pinned_columns=[f"summary:eval/{name}" for name in scores[:3]],
        ),
    )


def _group_of(run: RunFolder) -> str:
    """As the logger was told (conf/logger/wandb.yaml)."""
    told = (run.config.get("logger") or {}).get("wandb") or {}
    paths = run.config.get("paths") or {}
    return str(told.get("group") or group(str(run.path), str(paths.get("runs", run.path.parent.parent))))


def _better(name: str) -> str:
    return "higher" if higher_is_better(name) else "lower"


def _spread(key: str) -> bool:
    return key.endswith(("_std", "_ci95"))
