"""The stored cases in pytest, and the runner's own behaviour."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.golden import runner
from tests.golden.__main__ import main

runner.load_kinds()


@pytest.mark.golden
@pytest.mark.parametrize("folder", runner.find_cases(runner.DATA), ids=lambda folder: folder.name)
def test_case(folder):
    verdict = runner.run_case(folder)
    assert verdict.status == "PASS", verdict.line()


def _write_case(folder, kind, outputs, config=None):
    folder.mkdir(parents=True)
    description = {
        "kind": kind,
        "config": config or {},
        "procedure": "",
        "dtype": "float32",
        "rtol": 1e-4,
        "atol": 1e-6,
    }
    (folder / "case.json").write_text(json.dumps(description))
    save_file({f"outputs/{key}": value for key, value in outputs.items()}, folder / "tensors.safetensors")


def test_runner_tells_pass_fail_and_unsupported_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(runner.KINDS, "test.two", lambda case: {"a": torch.full((3,), 2.0)})
    _write_case(tmp_path / "data" / "good", "test.two", {"a": torch.tensor([2.0, 2.0, 2.0001])})
    _write_case(tmp_path / "data" / "wrong", "test.two", {"a": torch.tensor([2.0, 2.0, 2.1])})
    _write_case(tmp_path / "data" / "shape", "test.two", {"a": torch.ones(4)})
    _write_case(tmp_path / "data" / "missing", "test.two", {"a": torch.full((3,), 2.0), "b": torch.ones(1)})
    _write_case(tmp_path / "data" / "other", "test.none", {"a": torch.ones(1)})

    assert main([str(tmp_path / "data"), "--json", str(tmp_path / "out" / "verdicts.json")]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 3 failed, 1 unsupported"
    report = json.loads((tmp_path / "out" / "verdicts.json").read_text())
    status = {case["case"]: case["status"] for case in report["cases"]}
    assert status == {"good": "PASS", "wrong": "FAIL", "shape": "FAIL", "missing": "FAIL", "other": "UNSUPPORTED"}
    assert main([str(tmp_path / "data" / "good")]) == 0
    assert main([str(tmp_path / "data" / "other")]) == 0
    assert main([str(tmp_path)]) == 2


def test_unknown_option_is_a_failure_with_its_name(tmp_path):
    chain = {"respacing": "5", "schedule": "linaer"}
    _write_case(tmp_path / "choice", "dit.schedules", {"a": torch.ones(1)}, {"respacings": {"r": chain}})
    verdict = runner.run_case(tmp_path / "choice")
    assert verdict.status == "FAIL" and "Did you mean 'linear'" in verdict.message
    _write_case(tmp_path / "option", "dit.schedules", {"a": torch.ones(1)}, {"respacings": {}, "warp": 1})
    verdict = runner.run_case(tmp_path / "option")
    assert verdict.status == "FAIL" and "warp" in verdict.message


def test_nan_against_a_number_fails_and_equal_infinities_pass():
    inf, nan = float("inf"), float("nan")
    assert runner.compare("c", "k", {"a": torch.tensor([inf])}, {"a": torch.tensor([inf])}, 1e-4, 0.0).status == "PASS"
    assert runner.compare("c", "k", {"a": torch.tensor([nan])}, {"a": torch.tensor([1.0])}, 1e-4, 0.0).status == "FAIL"
    assert runner.compare("c", "k", {"a": torch.tensor([inf])}, {"a": torch.tensor([1.0])}, 1e-4, 0.0).status == "FAIL"
