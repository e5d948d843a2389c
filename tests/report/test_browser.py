"""The report in a real browser, from disk: nothing is asked for elsewhere, and narrow screens hold it."""

import pytest

from tasks.report import write_report
from tests.chromium import drive, needs_chromium
from tests.report.made_up import make_run

pytestmark = [pytest.mark.browser, needs_chromium]

BROKEN = "[...document.images].filter(x => !x.complete || !x.naturalWidth).length"
FIGURES = "[...document.querySelectorAll('#curves figure > :not(figcaption)')]"
SHOWN = f"{FIGURES}.filter(x => x.offsetHeight).map(x => x.className).join(' ')"


async def fits(page):
    assert await page.value("document.images.length") > 5 and await page.value(BROKEN) == 0
    for width in (1280, 390):
        await page.size(width, 800)
        await page.until(f"document.documentElement.scrollWidth <= {width}", 20)
    # Every script of the page would be somebody else's.
    assert await page.value("document.scripts.length") == 0


def test_a_run(tmp_path):
    file = write_report(make_run(tmp_path / "run"))

    async def steps(page):
        await fits(page)
        await page.value("document.querySelector('#axis-log').click()")
        assert await page.value("getComputedStyle(document.querySelector('#losses img.linear')).display") == "none"

    assert [url for url in drive(file.as_uri(), steps) if not url.startswith("data:")] == [file.as_uri()]


def test_a_leaderboard_switches_its_axis(tmp_path):
    for place, aligner in enumerate(("none", "repa", "a_variant_with_a_long_name_and_more_to_say")):
        words = (f"aligner={aligner}", "optimizer.lr=0.0001", "callbacks.evaluate.num_samples=300")
        make_run(tmp_path / str(place), gain=1.0 + place, words=words)
    file = write_report(tmp_path)

    async def steps(page):
        await fits(page)
        for kind in ("linear", "log", "hours", "flops"):
            await page.value(f"document.querySelector('#axis-{kind}').click()")
            assert set((await page.value(SHOWN)).split()) == {kind}, kind

    assert [url for url in drive(file.as_uri(), steps) if not url.startswith("data:")] == [file.as_uri()]
