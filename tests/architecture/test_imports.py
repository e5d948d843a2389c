import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
METHODS = "ldm sit_ sd3 repa_ repae sra layersync deepflow ddt redi u_repa softrepa rae svg epg digit uniflow".split()


def test_import_arrows_hold():
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_core_imports_alone():
    code = (
        "import sys, pkgutil, importlib, repalign\n"
        "for m in ('lightning', 'hydra', 'omegaconf', 'wandb', 'pytorch_lightning'): sys.modules[m] = None\n"
        "for m in pkgutil.walk_packages(repalign.__path__, 'repalign.'): importlib.import_module(m.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_core_file_branches_on_a_method_name():
    pattern = re.compile(r"""(==|!=|\bin\b)\s*[\[(]?["'](""" + "|".join(METHODS) + ")")
    for path in (ROOT / "repalign").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_backbone_files_define_topology_alone():
    """A layer (a module that holds weights of its own) belongs to nn/, so that backbones share it."""
    for path in (ROOT / "repalign" / "backbones").glob("*.py"):
        assert not re.search(r"nn\.(Parameter|Conv2d|LayerNorm|MultiheadAttention)\(", path.read_text()), path.name


def test_files_stay_short():
    for folder in ("repalign", "lightning_modules", "datamodules", "callbacks", "tasks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 300, path
