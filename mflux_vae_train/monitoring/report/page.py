"""A report as one HTML file that loads nothing, which its content security policy enforces. All texts are escaped."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import numpy as np

RUNNING = "running"
"""The state of a run that goes on."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page.

    Attributes:
        name: one word for the navigation and the anchor.
        title: heading.
        body: HTML; a section without any is omitted.
        note: a sentence below the heading.
    """

    name: str
    title: str
    body: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PageHeader:
    """The top of the page.

    Attributes:
        kind: subject of the page, in a few words.
        title: its name.
        about: a line below the title.
        state: running, finished or stopped; and a note on it.
        progress: in [0, 1].
        stats: (name, value, remark) of the most important numbers.
        written: seconds since 1970.
        expected: seconds until the page of a running run is written again, at most. An open page loads itself again
            until the run has ended; it says so if nothing was written for much longer.
    """

    kind: str
    title: str
    about: str
    state: tuple[str, str]
    progress: float
    stats: Sequence[tuple[str, str, str]]
    written: float
    expected: float = 0.0


def page(header: PageHeader, sections: Sequence[Section]) -> str:
    """The HTML of the page."""
    shown = [section for section in sections if section.body]
    links = "".join(map(_link, shown))
    stats = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in header.stats
    )
    state, state_note = header.state
    clock = time.strftime("%Y-%m-%d %H:%M", time.localtime(header.written))
    times = f' data-written="{header.written:.0f}" data-expected="{header.expected:.0f}"' if state == RUNNING else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(header.title)} · {escape(header.kind)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<header>
<p class="kind">{escape(header.kind)}</p>
<h1>{escape(header.title)}</h1>
<p class="about">{escape(header.about)}</p>
<p class="state {state}"{times}><b>{state}</b> <span>at {clock}: {escape(state_note)}</span></p>
<div class="done"><div style="width:{100 * min(max(header.progress, 0), 1):.1f}%"></div></div>
<dl class="figures">{stats}</dl>
</header>
<nav>{links}</nav>
<main>
{"".join(map(_section, shown))}</main>
<dialog><img alt=""><p></p></dialog>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


def with_section(html: str, section: Section, *, before: str) -> str:
    """A page with a section replaced, or added before another one; unchanged if there is no such place."""
    start, end = html.find(f'<section id="{section.name}">'), "</section>\n"
    if start >= 0:
        return html[:start] + _section(section) + html[html.index(end, start) + len(end) :]
    for mark, part in ((f'<section id="{before}">', _section(section)), (f'<a href="#{before}">', _link(section))):
        html = html.replace(mark, part + mark, 1)
    return html


def image_element(pixels: np.ndarray, *, largest: int, caption: str) -> str:
    """uint8 (H, W, 3) -> an img element with the image embedded, scaled down to `largest` pixels.

    Images of up to 128 pixels are PNG and shown with visible pixels; larger ones are JPEG.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    small = max(image.size) <= 128
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    kind = "png" if small else "jpeg"
    image.save(buffer, kind, quality=88)  # PNG has none
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = escape(caption)
    css_class = ' class="pixels"' if small else ""
    return (
        f'<img{css_class} src="data:image/{kind};base64,{data}" width="{image.width}" height="{image.height}"'
        f' alt="{text}" title="{text}">'
    )


def table(rows: Sequence[tuple[str, str, str, bool]]) -> str:
    """(name, value, explanation, whether the value is not the default) -> a table of two columns."""
    return (
        "<table>"
        + "".join(
            f'<tr{" class=set" if changed else ""} title="{escape(explanation)}"><th scope="row">{escape(name)}</th>'
            f"<td>{escape(value)}</td></tr>"
            for name, value, explanation, changed in rows
        )
        + "</table>"
    )


def _link(section: Section) -> str:
    return f'<a href="#{section.name}">{escape(section.name.capitalize())}</a>'


def _section(section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    return f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>{note}\n{section.body}\n</section>\n'


def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
