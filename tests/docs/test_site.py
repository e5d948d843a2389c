"""The built site: no warning, no dead link, nothing from elsewhere, readable on a narrow screen."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.chromium import drive, needs_chromium

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Built as `make docs` builds it: a warning is an error."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    words = ["build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


class Links(HTMLParser):
    """What a page loads by itself, where its links lead, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif values.get("src") or values.get("href"):
            self.loaded.append(values.get("src") or values.get("href"))


def test_every_page_loads_what_lies_beside_it_and_every_link_leads_somewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 50
    for page, found in pages.items():
        for address in found.loaded:
            assert not re.match(r"(\w+:)?//", address), f"{page.name} loads {address}"
            assert (page.parent / address.partition("?")[0]).exists(), f"{page.name} loads {address}"
        for address in found.links:
            if re.match(r"\w+:", address) or not address:
                continue
            file, _, anchor = address.partition("#")
            aim = (page.parent / file).resolve() if file else page
            assert aim.exists(), f"{page.name}: {address}"
            if anchor and aim.suffix == ".html":
                assert anchor in pages[aim].anchors, f"{page.name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text(encoding="utf-8")), style.name


def test_what_is_made_from_the_repository_is_there(site):
    page = (site / "methods" / "repa.html").read_text(encoding="utf-8")
    for part in ("<math", "repa_sit_xl", "fid 7.9", "repa.sit_forward", "3.1e-06"):
        assert part in page, part
    backbone = (site / "concepts" / "backbone.html").read_text(encoding="utf-8")
    assert "repalign.protocols.Backbone" in backbone and "sit_xl_2" in backbone
    assert "planned" in (site / "methods.html").read_text(encoding="utf-8")
    assert "repalign.samplers.euler.Euler" in (site / "api" / "samplers.html").read_text(encoding="utf-8")


@pytest.mark.browser
@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("name", ["index.html", "methods/repa_e.html", "concepts/sampler.html", "compatibility.html"])
def test_a_browser_asks_nobody_and_a_narrow_screen_holds_the_page(site, name):
    async def steps(page):
        for width in (1280, 390):
            await page.size(width, 800)
            await page.until(f"document.documentElement.scrollWidth <= {width}", 30)  # once it is laid out anew
        assert await page.value("[...document.images].every(image => image.naturalWidth > 0)")

    requests = drive((site / name).as_uri(), steps)
    assert requests and not [url for url in requests if not url.startswith(("file://", "data:"))]
