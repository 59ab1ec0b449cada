"""JupyterLab as `make lab` starts it, in a real browser: the first page and the playground."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import TimeoutError, expect

from ctxlm.files import ROOT
from tests.browser import Browser

pytestmark = pytest.mark.slow
LAB = ROOT / ".venv" / "bin" / "jupyter-lab"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """What JupyterLab shows and saves into, so that ours stay as they are."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("notebooks", "params", "docs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def lab(copy: Path, browser: Browser) -> Iterator[Browser]:
    """A browser at the address that JupyterLab prints."""
    if not LAB.exists():
        pytest.skip("no environment made by `make env`, whose JupyterLab this is about")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"JUPYTER_{name}_DIR": str(copy / ".jupyter" / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name}_DIR": str(copy / ".jupyter" / name) for name in ("SETTINGS", "WORKSPACES")}
    command = ["make", "lab", f"VENV={LAB.parents[1]}", "-o", str(LAB.parents[1] / ".ready")]
    command += [f"LAB=--no-browser --port={port}"]
    log = copy / "lab.log"
    environment = os.environ | folders | {"CTXLM_OUTPUTS": str(copy / "outputs")}
    options = {"cwd": copy, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    server = subprocess.Popen(command, stdout=log.open("w"), **options)
    try:
        browser.page.goto(address(server, log))
        yield browser
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def address(server: subprocess.Popen, log: Path) -> str:
    for _ in range(1200):
        printed = re.search(r"http://127\.0\.0\.1:(\d+)/lab\S*token=\w+", log.read_text())
        if printed:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(printed[1]))):
                return printed[0]
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.1)
    raise AssertionError(log.read_text())


def run_all(lab: Browser, notebook: str) -> None:
    """Open a notebook, run all of its cells, and see that none of them complains."""
    page = lab.page
    page.goto(page.url.partition("/lab/")[0] + f"/lab/tree/notebooks/{notebook}?reset")  # alone
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=MINUTES)
    for _ in range(3):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.wait_for_function(f"() => ({ALL_RUN})() || document.querySelector('.jp-Dialog')", timeout=MINUTES)
        except TimeoutError as error:
            raise AssertionError(page.locator("body").inner_text()) from error
        if not page.locator(".jp-Dialog").count():
            break
        # on a slow machine the kernel is not there yet, and JupyterLab asks for one
        page.get_by_role("button", name="Select", exact=False).last.click()
        page.wait_for_timeout(5_000)
    assert page.locator(COMPLAINTS).all_text_contents() == []


MINUTES = 300_000
"""How long a notebook may take, milliseconds; nothing waits where all is done."""
ALL_RUN = """() => {
  const prompts = [...document.querySelectorAll(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .jp-InputPrompt")];
  return prompts.length && prompts.every(prompt => /\\[\\d+\\]/.test(prompt.textContent)); }"""
COMPLAINTS = ".jp-NotebookPanel:not(.lm-mod-hidden) [data-mime-type$='stderr'], [data-mime-type$='error']"


def test_it_opens_on_the_first_page_and_asks_no_other_host(lab):
    lab.page.get_by_role("heading", name="Welcome").wait_for(timeout=60_000)
    assert lab.page.get_by_role("link", name="09_playground").count()
    lab.page.wait_for_timeout(2_000)
    assert all(re.match(r"(http|ws)://127\.0\.0\.1:|data:|blob:", url) for url in lab.requests)


def section(lab: Browser, heading: str):
    """The first code cell below a heading."""
    cell = "div[contains(concat(' ', @class, ' '), ' jp-{} ')]"
    below = f"xpath=ancestor::{cell.format('Cell')}/following-sibling::{cell.format('CodeCell')}[1]"
    first = lab.page.get_by_role("heading", name=heading).locator(below)
    first.scroll_into_view_if_needed()  # out of sight, outputs are not drawn
    return first


def test_the_playground_answers(lab, copy):
    path = copy / "notebooks" / "09_playground.ipynb"
    small = path.read_text().replace("train_now = False", "train_now = True")
    path.write_text(small.replace(r"\"num_layers\": 3", r"\"train_tokens\": 1000, \"phase2_epochs\": 2"))
    run_all(lab, path.name)
    trained = section(lab, "Train a small one")
    trained.get_by_role("cell", name="phase2_epochs", exact=True).wait_for()
    assert trained.locator("img").count() == 2  # the live curve, and that beside the preset's
    assert (copy / "outputs" / "interactive" / "A_train_tokens-1000_phase2_epochs-2" / "metrics.json").exists()

    asked = section(lab, "Ask")
    bars = asked.locator(".jp-RenderedHTML")
    before = bars.inner_text()
    asked.locator("input[type=text]").first.fill("I went to the")
    asked.locator("input[type=text]").first.press("Enter")
    expect(bars).not_to_have_text(before, use_inner_text=True, timeout=60_000)

    generated = section(lab, "Generate")
    drawn = generated.locator("pre").last
    before = drawn.inner_text()
    generated.locator(".widget-slider", has_text="temperature").locator(".noUi-handle").press("ArrowLeft")
    expect(drawn).not_to_have_text(before, use_inner_text=True, timeout=60_000)
    assert lab.page.locator(COMPLAINTS).all_text_contents() == []
