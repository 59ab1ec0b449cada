"""A real browser: Debian's Chromium, driven by Playwright."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

from ctxlm.analysis.run_plots import NARROW, WIDTH
from ctxlm.analysis.site import BROWSERS

SIZES = {390: 844, 1280: 844}


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Skips the test where no Chromium is installed."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--hide-scrollbars"])
        yield Browser(launched.new_page())
        launched.close()


class Browser:
    """One page, and what it asked for and complained of since it was opened."""

    def __init__(self, page: Page):
        self.page, self.requests, self.complaints = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", lambda line: line.type == "error" and self.complaints.append(line.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, path: Path, width: int = 1280, dark: bool = False) -> None:
        self.page.set_viewport_size({"width": width, "height": SIZES[width]})
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.requests.clear(), self.complaints.clear()
        self.page.goto(path.resolve().as_uri())

    def run(self, expression: str):
        return self.page.evaluate(expression)

    def printed(self) -> int:
        """Pages of the print."""
        return len(re.findall(rb"/Type\s*/Page\b", self.page.pdf(prefer_css_page_size=True)))

    def barriers(self) -> list[str]:
        """What axe-core finds serious or critical: of each the rule, and the first element. Of a table's rows, which
        are alike, the first 30 are looked at."""
        self.run("document.querySelectorAll('tbody tr:nth-child(n + 31)').forEach(row => row.remove())")
        grave = [one for one in Axe().run(self.page).response["violations"] if one["impact"] in ("serious", "critical")]
        return [f"{one['id']}: {one['nodes'][0]['html'][:120]}" for one in grave]


SMALL = """[...document.querySelectorAll("body *")].filter(e => e.checkVisibility()
  && [...e.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
  && parseFloat(getComputedStyle(e).fontSize) < 14).map(e => e.outerHTML.slice(0, 80))"""
BESIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LABELS = f"""[...document.querySelectorAll("img")].map(e => e.clientWidth * (e.src.includes("svg+xml")
  ? 14 / e.naturalWidth : 9 / 72 / (e.className == "narrow" ? {NARROW} : {WIDTH})))"""
"""Heights of the figures' smallest labels as they are shown, px: a drawing's, and 9 points on a figure's inches."""
CUT = """[...document.querySelectorAll("img.narrow")].filter(
  e => e.getBoundingClientRect().right > innerWidth).map(e => e.alt)"""
"""Figures that are meant to be seen whole, and are not."""


def read_by_everyone(browser: Browser, page: Path, barriers: bool = True) -> None:
    """On a phone and in the dark, a page overflows nowhere, has no small text, asks for nothing, fails nowhere and, if
    that is looked for, which takes seconds, has no barrier that axe-core finds."""
    for width, dark in ((390, False), (1280, True)):
        browser.open(page, width, dark)
        assert browser.requests and all(url.startswith(("file:", "data:")) for url in browser.requests)
        assert browser.complaints == [], page
        assert browser.run("innerWidth") == width and browser.run(BESIDE) <= 0, page
        assert browser.run(SMALL) == [], page
        assert all(shown >= 9 for shown in browser.run(LABELS)), page
        assert browser.run(CUT) == [], page
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (ground != "rgb(255, 255, 255)") == dark
        assert not barriers or browser.barriers() == [], page
