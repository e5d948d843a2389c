"""task=dashboard: a workspace that names only what was really logged, and one line where there is no account."""

import json
import re

import pytest
from omegaconf import OmegaConf

from repalign.errors import UserError
from tasks import dashboard
from tests.docs.names import undescribed
from tests.report.made_up import make_run
from tests.report.wandb_file import history
from tests.smoke.test_recipes_train import train

pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")


def task(folder, **options):
    fixed = {"project": "p", "entity": None, "title": None, "sort": None, "output": None}
    return OmegaConf.create({"task": {"folder": str(folder), **fixed, **options}})


def keys_in(description):
    """Every name that a description draws, sorts by or pins."""
    found, (section,) = set(), [description["spec"]["section"]]
    for bank in section["panelBankConfig"]["sections"]:
        for panel in bank["panels"]:
            config = panel["config"]
            found |= {*config.get("metrics", []), *config.get("mediaKeys", []), config.get("xAxis", "")}
            found |= set(re.findall(r'"key": {[^{}]*"val": "([^"]+)"', json.dumps(config.get("panel2Config", {}))))
    (runs,) = section["runSets"]
    found |= {column.removeprefix("summary:") for column in json.dumps(runs).split('"') if "summary:" in column}
    return found - {"", "_step", "trainer/global_step"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_names_only_what_was_logged(tmp_path, monkeypatch, capsys):
    """Against the file that W&B itself wrote."""
    monkeypatch.setattr(dashboard, "has_account", lambda: False)
    words = ("experiment=repa_sit_s", "logger=wandb", "callbacks=evaluation", "callbacks.evaluate.every=2")
    run_dir = train(tmp_path, *words, "~metric.scores.fd_lite0", "metric.scores.is_lite0.splits=2")
    dashboard.run(task(tmp_path / "repa_sit_s"))
    said = capsys.readouterr().out
    assert "no W&B account on this machine" in said and "dashboard.json" in said
    description = json.loads((tmp_path / "repa_sit_s" / "dashboard.json").read_text())
    named, logged = keys_in(description), {key for key, _, _ in history(run_dir)}
    assert named <= logged, sorted(named - logged)
    assert not undescribed(logged)
    wanted = {"eval/kid_lite0", "eval/is_lite0", "eval/cost/flops", "eval/cost/device_hours", "train/loss"}
    wanted |= {"train/align/repa", "grids/ema", "grids/raw", "grids/samples", "throughput/flops"}
    assert wanted <= named
    sections = [bank["name"] for bank in description["spec"]["section"]["panelBankConfig"]["sections"]]
    assert sections[:2] == ["Scores", "Scores against cost"] and {"Samples", "Losses", "System"} <= set(sections)
    assert '"value": ["repa_sit_s"]' in json.dumps(description) and '"p"' in json.dumps(description)


def logged_run(folder, name, aligner, seed=0):
    run = make_run(folder / name, seed, words=(f"aligner={aligner}",))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text + "logger: {csv: {}, wandb: {group: demo/sweep}}\n")
    return run


def test_scores_in_order_and_seeds_together(tmp_path):
    for seed in range(2):
        logged_run(tmp_path, f"a{seed}", "none", seed)
        logged_run(tmp_path, f"b{seed}", "repa", seed)
    runs = dashboard.logged_runs(tmp_path)
    assert dashboard.scores_of(dashboard.keys_of(runs), None) == ["is_lite0", "fd_lite0", "kid_lite0"]
    assert dashboard.scores_of(["eval/kid", "eval/fid", "eval/is", "eval/fid_std"], None) == ["fid", "is", "kid"]
    with pytest.raises(UserError, match="task.sort: unknown score 'fd'"):
        dashboard.workspace(runs, "p", None, "t", "fd")
    made = dashboard.workspace(runs, "p", "me", "t", "fd_lite0")
    described = json.dumps(dashboard.described(made))
    assert (
        "variant" in described and "demo/sweep" in described and described.index("fd_lite0") < described.index("is_l")
    )


def test_with_an_account_it_is_saved_or_says_why_not(tmp_path, monkeypatch, capsys):
    logged_run(tmp_path, "a", "none")
    monkeypatch.setattr(dashboard, "has_account", lambda: True)
    saved = []
    monkeypatch.setattr(dashboard, "save", lambda made: saved.append(made) or "address")
    dashboard.run(task(tmp_path, entity="me", title="Sweep"))
    assert saved[0].entity == "me" and saved[0].name == "Sweep" and "address" in capsys.readouterr().out

    def refuse(self):
        raise ConnectionError("no\nroute")

    monkeypatch.undo()
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", refuse)
    with pytest.raises(UserError, match=r"W&B did not take the workspace \(ConnectionError: no route\)"):
        dashboard.save(saved[0])


def test_messages(tmp_path):
    with pytest.raises(UserError, match="task.folder: no folder"):
        dashboard.run(task(tmp_path / "none"))
    make_run(tmp_path / "run")
    with pytest.raises(UserError, match="of 1 runs in .* none has logged to W&B; train with logger=wandb"):
        dashboard.run(task(tmp_path))
