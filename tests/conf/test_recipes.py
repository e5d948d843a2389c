from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tasks.check import TOP_LEVEL, check_composition
from tasks.launch import compose

CONF = Path(__file__).parents[2] / "conf"
# Groups whose choice does not stand at the top.
PLACES = {
    "latent_norm": "latent_norm@autoencoder.norm",
    "curation": "+curation@task.steps.another",
    "descriptor": "descriptor@task.steps.near_duplicates.network",
}
TASKS = {"curation": "curate", "descriptor": "curate"}  # whose parts they are
RECIPES = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir())


@pytest.fixture(autouse=True)
def data_root(monkeypatch, tmp_path):
    for name in ("IMAGENET", "IMAGES", "CC12M", "COCO", "COCO_CAPTIONS", "PAIRS"):
        monkeypatch.setenv(f"REPALIGN_{name}", str(tmp_path))
    monkeypatch.setenv("REPALIGN_BASE", __file__)  # of recipes that begin with given weights; the checks do not open it


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_passes_the_checks(recipe):
    cfg = compose([f"experiment={recipe}"])
    check_composition(cfg)
    assert cfg.name == recipe
    assert cfg.reference is not None


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_short_diff_that_names_its_paper(recipe):
    lines = (CONF / "experiment" / f"{recipe}.yaml").read_text().splitlines()
    assert len(lines) <= 40
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("debug", ["tiny"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_tiny_twin(recipe, debug):
    check_composition(compose([f"experiment={recipe}", f"debug={debug}"]))


def test_the_surface_of_the_configuration_is_frozen():
    assert set(compose(["experiment=repa_sit_xl"])) == TOP_LEVEL


@pytest.mark.parametrize("group", [g for g in GROUPS if g not in ("experiment", "debug", "paths", "task")])
def test_every_choice_of_every_group_composes(group):
    for choice in sorted(p.stem for p in (CONF / group).glob("*.yaml")):
        cfg = compose([f"task={TASKS.get(group, 'train')}", f"{PLACES.get(group, group)}={choice}"])
        assert OmegaConf.is_config(cfg)
