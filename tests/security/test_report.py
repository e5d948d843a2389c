"""Words of a run folder in its report: escaped in HTML, inert in Markdown and in spreadsheets."""

import csv
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from tasks.report import write_report
from tests.report.made_up import write_grids

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></details><iframe src=//x>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "javascript:alert(1)",
    '=HYPERLINK("http://x")',
    "| a | [b](javascript:alert(1)) `c`",
    "$\\frac{$",
)


class Tags(HTMLParser):
    """Tags and attributes that run something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "iframe", "object", "embed", "link", "base", "meta", "form"):
            self.found.append((tag, attrs))
        for name, value in attrs:
            if (
                name.startswith("on")
                or name in ("href", "src", "action", "style")
                and not (value or "").startswith(("./", "#", "data:image/"))
            ):
                self.found.append((tag, name, value))


def own_tags(page):
    parser = Tags()
    parser.feed(page)
    return [entry for entry in parser.found if not (entry[0] == "meta" and "onerror" not in str(entry))]


def run(folder, words):
    folder.mkdir(parents=True)
    attack = words[0]
    config = {
        "name": attack,
        "run_name": attack,
        "steps": 2,
        "reference": {attack: attack},
        "method": {"_target_": attack},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text(
        yaml.safe_dump([f"name={word}" for word in words] + [f"x={word}" for word in words])
    )
    rows = [
        (step, name, 1.5 - step)
        for step in (0, 1)
        for name in ("eval/fd", f"eval/{attack}", f"train/{attack}", "train/loss")
    ]
    with open(folder / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("step", "name", "value"), *rows])
    record = {"status": attack, "step": 2, "versions": {attack: attack}, "attribution": attack, "hardware": attack}
    (folder / "run.json").write_text(__import__("json").dumps(record))
    write_grids(folder / "samples", np.random.default_rng(0), 2)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_run_page_has_no_tag_of_the_run(attack, tmp_path):
    run(tmp_path / "run", [attack])
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert not own_tags(page)
    assert "49" not in re.findall(r"<title>(.*?)</title>", page)[0] if "7 * 7" in attack else True


def test_a_sweep_page_and_its_files_are_inert(tmp_path):
    for index, attack in enumerate(ATTACKS):
        name = "javascript:alert(1)" if index == 4 else f"<b>{index}"
        run(tmp_path / name, [attack])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert not own_tags(page)
    assert 'href="./javascript%3Aalert' in page
    with open(tmp_path / "sweep.csv", newline="") as file:
        for row in csv.reader(file):
            for cell in row:
                assert not cell.startswith(("=", "+", "@")) and (not cell.startswith("-") or float(cell) < 0)
    table = (tmp_path / "sweep.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in table if "<script" in line or re.search(r"(?<!\\)\[b\]", line)]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
    assert len(bars) == 1
