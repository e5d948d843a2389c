"""Backbones, token ios, objectives and aligners: what goes together runs, what does not is refused in one line."""

from __future__ import annotations

import itertools
import math

import pytest

from tasks.launch import CONF, compose
from tests.compatibility.matrix import (
    GROUPS,
    Result,
    architectures,
    combination,
    configuration,
    options,
    pairs,
    step,
)
from tests.compatibility.page import COMMAND, PAGE, of, render

# The cells are trained once, in one process, by whichever test comes first: half a minute of one core.
pytestmark = [pytest.mark.xdist_group("compatibility"), pytest.mark.timeout(1800)]

# One of two parts is named in every refusal by its group, its key or its class.
PARTS = ("backbone", "token_io", "objective", "aligner", "streams", "time_sampler", "path")


def test_the_page_is_what_the_code_does():
    assert PAGE.read_text(encoding="utf-8") == render(), f"docs/compatibility.md is out of date; run: {COMMAND}"


def test_every_refusal_is_one_line_that_names_two_parts():
    refusals = {of(chosen).refusal for _, chosen in pairs()} - {None}
    assert refusals
    for line in refusals:
        assert "\n" not in line and len(line) < 320, line
        assert "do not go together" in line, line
        assert sum(part in line.split(";")[0] for part in PARTS) >= 2, line
        assert ";" in line and any(word in line.split(";")[1] for word in ("set ", "choose ")), line


def test_aligners_run_wherever_their_tap_is():
    """All but the one for tokens with times of their own, which only one backbone takes."""
    for backbone, aligner in itertools.product(options("backbone"), options("aligner")):
        found = of(combination({"backbone": backbone, "aligner": aligner}))
        assert found.refusal is None or aligner == "sra_groups", found.refusal


def test_every_file_is_in_the_matrix():
    named = {name for names in architectures().values() for name in names}
    whole = {path.stem for path in (CONF / "backbone").glob("*.yaml") if "???" not in path.read_text()}
    assert whole <= named
    for group in ("token_io", "aligner"):
        assert set(options(group)) == {path.stem for path in (CONF / group).glob("*.yaml")}
    assert "denoising" in options("objective") and "reconstruction" not in options("objective")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_whole_combination_runs_when_its_pairs_do():
    """Four choices at once: nothing but a step or a refusal, and no refusal that none of the pairs has."""
    ran = refused = 0
    for choice in itertools.product(*map(options, GROUPS)):
        chosen = combination(dict(zip(GROUPS, choice, strict=True)))
        found = step(configuration(chosen))
        ran, refused = ran + (found.refusal is None), refused + (found.refusal is not None)
        if found.refusal is None:
            assert all(math.isfinite(term) for term in found.terms.values())
        else:
            assert "do not go together" in found.refusal, (chosen, found.refusal)
    print(f"{ran} of {ran + refused} whole combinations run")


TERMS = ("repa", "layer_sync", "sra_cosine", "u_repa")


@pytest.mark.parametrize(
    "aligners",
    [c for size in (2, len(TERMS)) for c in itertools.combinations(TERMS, size)],
    ids="+".join,
)
def test_aligners_add_up(aligners):
    """The total is the denoising loss and the weighted sum of the terms, each as it is when it stands alone."""

    def train(*chosen: str) -> Result:
        taps = ["align.tap=block.2", "align.sra={tap: block.1, target: block.5, gap: 0.2, weight: 0.5}"]
        taps += ["align.layer_sync={tap: block.3, target: block.6, weight: 0.2}", "align.u_repa.tap=block.4"]
        words = ["debug=tiny", "method=generative", "backbone=sit_demo", "encoder=tiny", *taps]
        return step(compose([*words, f"aligner=[{','.join(chosen)}]"]))

    found = train(*aligners)
    assert len(found.weights) == len(aligners)
    expected = found.terms["denoising"]
    for name, weight in found.weights.items():
        expected += weight * found.terms[f"align/{name}"]
    assert found.terms["loss"] == pytest.approx(expected, rel=1e-5)
    alone = train(aligners[0])
    assert alone.terms["denoising"] == pytest.approx(found.terms["denoising"], rel=1e-5)
    [name] = alone.weights
    assert abs(found.terms[f"align/{name}"]) > 1e-4
