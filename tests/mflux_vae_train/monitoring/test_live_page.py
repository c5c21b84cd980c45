"""The page of a running run in a real browser: it loads itself again, and shows what it showed before."""

from __future__ import annotations

import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mflux_vae.weights.formats.files import write_text
from mflux_vae_train.monitoring import browser as user_browser
from mflux_vae_train.monitoring.report.page import PageHeader, Section, image_element, page
from tests.helpers import browser
from tests.helpers.browser import Browser


def write(path: Path, state: str, *labels: str, written: float | None = None, expected: float = 2) -> None:
    """A page with previews of these labels, and text above and below."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    rows = [
        f'<div class="time"><span>{label}</span><div class="row">'
        f"{image_element(pixels + index, largest=8, caption=label)}</div></div>"
        for index, label in enumerate(labels)
    ]
    scene = (
        '<div><div class="scene" data-of="0"><div class="row"></div><div class="scrub" hidden>'
        f'<input type="range" min="0" max="{len(rows) - 1}" value="{len(rows) - 1}" step="1"><output>{labels[-1]}'
        f'</output></div></div><div class="times" data-prompt="0">{"".join(rows)}</div></div>'
    )
    text = "".join(f"<p>{index}</p>" for index in range(100 + 40 * len(labels)))
    sections = [
        Section(name="before", title="Before", body=text),
        Section(name="previews", title="Previews", body=scene),
        Section(name="after", title="After", body=text),
    ]
    header = PageHeader(
        kind="a run", title=f"{len(labels)} rows", about="", state=(state, "after update 3 of 6"), progress=0.5,
        stats=[], written=time.time() if written is None else written, expected=expected,
    )  # fmt: skip
    write_text(path, page(header, sections))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if (program := browser.find()) is None:
        pytest.skip("no Chromium or Chrome is installed")
    with Browser(program, tmp_path_factory.mktemp("profile")) as found:
        yield found


LABEL, TITLE = (f"document.querySelector('{name}').textContent" for name in ("output", "h1"))
PLACE = "document.querySelector('#after').getBoundingClientRect().top"
KEEPS_PLACE = f"Math.abs({PLACE} + 50) < 2"
LOADED = "document.readyState === 'complete'"


@pytest.mark.slow
def test_a_running_page_loads_itself_again_until_the_run_ends(opened: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(path, "running", "untrained", "step 3")
    opened.open(path)
    scroll = f"scrollBy({{top: {PLACE} + 50, behavior: 'instant'}})"
    opened.wait_for(f"{LOADED} && {LABEL} === 'step 3' && ({scroll}, {KEEPS_PLACE})")
    write(path, "running", "untrained", "step 3", "step 6")  # the last row stays the last one; the text grows
    opened.wait_for(f"{TITLE} === '3 rows' && {LABEL} === 'step 6' && {KEEPS_PLACE}")
    move = "(one => { one.value = 1; one.dispatchEvent(new Event('input')); })(document.querySelector('input'))"
    enlarge = "document.querySelector('.times img').click()"
    opened.wait_for(f"{LOADED} && ({move}, {enlarge}, {LABEL} === 'step 3')")
    write(path, "finished", "untrained", "step 2", "step 3", "step 6")
    time.sleep(3)
    assert opened.value(TITLE) == "3 rows", "someone looks at an image"
    opened.value("document.querySelector('dialog').click()")
    opened.wait_for(f"{TITLE} === '4 rows' && {LABEL} === 'step 3' && {KEEPS_PLACE}")
    assert opened.value("document.querySelector('.scene img').alt") == "step 3"
    assert opened.value("document.querySelector('.state').dataset.written === undefined"), "it stays as it is"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("minutes", "expected", "state"), [(20, 30, "no news"), (20, 600, "running"), (1, 30, "running")]
)
def test_a_page_that_is_not_written_any_more(
    minutes: float, expected: float, state: str, opened: Browser, tmp_path: Path
) -> None:
    write(tmp_path / "report.html", "running", "untrained", written=time.time() - 60 * minutes, expected=expected)
    opened.open(tmp_path / "report.html")
    opened.wait_for(f"document.querySelector('.state b').textContent === '{state}'")
    assert " at 20" in opened.value("document.querySelector('.state').textContent")


def test_a_browser_is_opened_where_there_is_a_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []

    def opens(page: str) -> bool:
        pages.append(page)
        return "firefox" in page

    monkeypatch.setattr(webbrowser, "open", opens)
    monkeypatch.setattr(user_browser.sys, "platform", "linux")
    for name in ("SSH_CONNECTION", "SSH_TTY", "WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert "screen" in str(user_browser.open_page(tmp_path / "firefox.html")) and not pages
    monkeypatch.setenv("DISPLAY", ":0")
    assert user_browser.open_page(tmp_path / "firefox.html") is None
    assert pages == [(tmp_path / "firefox.html").as_uri()]
    assert "no browser" in str(user_browser.open_page(tmp_path / "other.html"))
    monkeypatch.setenv("SSH_CONNECTION", "host")
    assert "remote" in str(user_browser.open_page(tmp_path / "firefox.html")) and len(pages) == 2
