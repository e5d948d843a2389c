"""The supply chain, offline, and the floors that are enforced at the start."""

import time
from importlib.metadata import PackageNotFoundError, version

import pytest

from repalign.errors import UserError
from tasks.floors import FLOORS, check_floors
from tests.security.audit import LOCK, faults_of, licences, packages, strangers

HASH = "--hash=sha256:" + "0" * 64


def test_the_lock_is_clean():
    lock = LOCK.read_text(encoding="utf-8")
    assert faults_of(lock) == [] and len(packages(lock)) > 100


def test_what_is_installed_is_what_the_lock_names():
    assert strangers(LOCK.read_text(encoding="utf-8")) == []


def test_every_licence_is_known():
    counted, unknown, _ = licences(sorted(packages(LOCK.read_text(encoding="utf-8"))))
    assert unknown == [] and sum(counted.values()) > 100


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("einops==0.8.1", "no SHA-256"),
        ("einops==0.8.1 \\\n    --hash=md5:00", "no SHA-256"),
        (f"einops>=0.8 \\\n    {HASH}", "not pinned"),
        (f"einops @ https://example.org/einops.whl \\\n    {HASH}", "has an address"),
        (f"--index-url https://example.org/simple\neinops==0.8.1 \\\n    {HASH}", "names an index"),
        (f"torch==2.9.1 \\\n    {HASH}", "below the floor 2.10"),
        (f"lightning==2.6.3 \\\n    {HASH}", "below the floor 2.6.6"),
        (f"torch-ema==0.3 \\\n    {HASH}", "is dead"),
    ],
)
def test_what_is_wrong_with_a_lock_is_named(line, part):
    faults = faults_of(line)
    assert any(part in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("package", "found", "parts"),
    [
        ("torch", "2.9.1", ["CVE-2026-24747", "2.10"]),
        ("torch", "2.5.1+cu121", ["CVE-2025-32434"]),
        ("lightning", "2.6.5", ["CVE-2026-58659", "2.6.6"]),
        ("lightning", "2.6.2", ["steal credentials"]),
        ("pytorch-lightning", "2.6.3", ["2.6.6"]),
        ("transformers", "5.2.0", ["CVE-2026-4372", "5.3"]),
        ("hydra-core", "1.3.2", ["1.3.4"]),
        ("pillow", "12.1.0", ["CVE-2026-25990", "12.1.1"]),
        ("torch", "no version", ["2.10"]),
    ],
)
def test_a_version_below_the_floor_is_refused_in_one_line(package, found, parts):
    with pytest.raises(UserError) as caught:
        check_floors(lambda name: found if name == package else version(name))
    line = str(caught.value)
    assert "\n" not in line and f"{package} {found}" in line and "pip install" in line
    for part in parts:
        assert part in line


def test_pre_releases_of_a_floor_are_below_it():
    with pytest.raises(UserError):
        check_floors(lambda name: "2.10.0rc1" if name == "torch" else version(name))


def test_what_is_not_installed_is_not_asked_for():
    def nothing(name):
        raise PackageNotFoundError(name)

    check_floors(nothing)


def test_floors_cost_nothing_and_hold_here():
    check_floors()
    began = time.process_time()
    check_floors()
    assert time.process_time() - began < 0.2
    assert len({floor.package for floor in FLOORS}) == len(FLOORS)


def test_the_start_asks_for_them(monkeypatch, capsys):
    from tasks import launch

    monkeypatch.setattr(launch, "check_floors", lambda: check_floors(lambda name: "0.1"))
    assert launch.launch(["experiment=demo"]) == 2
    assert "error: torch 0.1 is not safe" in capsys.readouterr().err


def test_the_floors_of_the_project_file_are_not_lower():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((LOCK.parent / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    floors = {floor.package: floor.lowest for floor in FLOORS}
    for requirement in map(Requirement, asked):
        lowest = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        if requirement.name in floors:
            assert Version(lowest[0]) >= Version(floors[requirement.name]), str(requirement)
