"""Named sweeps compose job by job, typed words win, and a job's folder knows what it holds."""

import csv
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from repalign.errors import UserError
from tasks import jobs
from tasks.check import check_composition
from tasks.launch import check_single, combinations, compose, for_all_jobs, named_sweep

CONF = Path(__file__).parents[2] / "conf"
SWEEPS = sorted(p.stem for p in (CONF / "sweep").glob("*.yaml"))
# Of the sweeps that belong to a paper's table and leave the recipe to the command line.
RECIPES = {"ddt_ratio_b": "ddt_b", "ddt_ratio_l": "ddt_l", "repa_e_ablation": "repa_e_sit_l"}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_job_of_a_named_sweep_composes(sweep, monkeypatch, tmp_path):
    monkeypatch.setenv("REPALIGN_IMAGENET", str(tmp_path))
    words = [f"sweep={sweep}", *([f"experiment={RECIPES[sweep]}"] if sweep in RECIPES else [])]
    found = combinations([*named_sweep(words), *words])
    assert len(found) > 1
    for line in found[::-3]:  # the recipes and choices themselves are composed by test_recipes.py
        check_composition(compose(line))


def test_typed_words_take_the_place_of_the_files():
    words = ["sweep=alignment_depth", "align.tap=block.2"]
    assert named_sweep(words) == ["experiment=family_repa"]
    assert named_sweep(["sweep=null"]) == named_sweep([]) == []


def test_an_interval_is_checked_at_its_ends():
    assert combinations(["align.weight=tag(log,interval(0.1,2))"]) == [["align.weight=0.1"], ["align.weight=2.0"]]


def test_the_words_for_all_jobs_wait_where_the_recipe_is_swept():
    """Hydra composes the sweep itself without a recipe, so a key of the recipes must reach the jobs alone."""
    words = ["experiment=family_none,family_repa", "callbacks.evaluate.every=5", "steps=2", "debug=tiny", "+a.b=1"]
    assert for_all_jobs(words) == [words[0], "callbacks.evaluate.every=choice(5)", *words[2:]]
    assert for_all_jobs(["experiment=family_none", words[1], "seed=0,1"]) == [
        "experiment=family_none",
        words[1],
        "seed=0,1",
    ]
    with pytest.raises(UserError, match=r"~callbacks.evaluate: only the recipes have this key"):
        for_all_jobs([words[0], "~callbacks.evaluate"])


def test_a_single_run_has_no_sweep_and_no_launcher():
    check_single(["sweep=null", "launcher=null", "steps=3"])
    for word in ("sweep=encoder", "launcher=slurm"):
        with pytest.raises(UserError, match="add -m"):
            check_single([word])


@pytest.mark.parametrize("launcher", ["joblib", "slurm", "submitit_local"])
def test_launchers_are_what_hydra_accepts(launcher):
    """The options in our files are options of the plugins."""
    pytest.importorskip(f"hydra_plugins.hydra_{'joblib' if launcher == 'joblib' else 'submitit'}_launcher")
    import hydra

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("config", overrides=[f"launcher={launcher}"], return_hydra_config=True)
    assert launcher.split("_")[0] in cfg.hydra.launcher._target_.lower()
    assert OmegaConf.to_container(cfg.hydra.launcher, resolve=False)


def job(tmp_path: Path, *words: str):
    cfg = compose(["experiment=family_repa", f"run_dir={tmp_path / 'job'}", *words])
    assert jobs.begin(cfg) in (True, False)
    return cfg


def test_a_finished_job_is_known_wherever_the_project_lies(tmp_path, monkeypatch):
    cfg = job(tmp_path)
    assert not jobs.begin(cfg)  # begun is not finished
    jobs.finish(cfg)
    monkeypatch.setenv("REPALIGN_CACHE", "/elsewhere")
    for words in ([], ["run_name=other"], ["resume=never"], ["steps=100"]):
        assert jobs.begin(compose(["experiment=family_repa", f"run_dir={tmp_path / 'job'}", *words]))


def test_more_steps_go_on(tmp_path):
    jobs.finish(job(tmp_path))
    longer = compose(["experiment=family_repa", f"run_dir={tmp_path / 'job'}", "steps=800"])
    assert not jobs.begin(longer)
    jobs.finish(longer)
    assert jobs.begin(longer)


def test_another_composition_is_refused_by_its_first_key(tmp_path):
    job(tmp_path)  # killed at once
    with pytest.raises(UserError, match=r"optimizer.lr was 0.001, is 0.1\); choose another run_name"):
        job(tmp_path, "optimizer.lr=0.1")
    with pytest.raises(UserError, match=r"aligners.repa.tap was 'block.4', is 'block.2'"):
        job(tmp_path, "align.tap=block.2")


def test_a_torn_record_is_one_line(tmp_path):
    job(tmp_path)
    (tmp_path / "job" / jobs.RECORD).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        job(tmp_path)


def test_the_score_is_the_last_value_of_its_name(tmp_path):
    cfg = job(tmp_path)
    assert jobs.score_of(cfg) is None
    cfg.score = "eval/fd_lite0"
    with pytest.raises(UserError, match="score: .* it has: none"):
        jobs.score_of(cfg)
    with open(tmp_path / "job" / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "name", "value"), (0, cfg.score, 9.0), (5, cfg.score, 7.5), (5, "x", 1)])
    assert jobs.score_of(cfg) == 7.5
