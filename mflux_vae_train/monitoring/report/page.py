"""A report as one HTML file: nothing is loaded, and its policy forbids to. All that comes from outside is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import numpy as np

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page.

    Attributes:
        name: in the navigation and as its place in the page; one word.
        title: its heading.
        body: HTML.
        note: a sentence below the heading.
    """

    name: str
    title: str
    body: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PageHeader:
    """What stands above all sections.

    Attributes:
        kind: what the page is about, in a few words.
        title: its name.
        about: a line below it.
        state: one of running, finished, stopped; and what is said of it.
        share: how much is done, in [0, 1].
        figures: (name, value, remark) of the most important numbers.
    """

    kind: str
    title: str
    about: str
    state: tuple[str, str]
    share: float
    figures: Sequence[tuple[str, str, str]]


def page(head: PageHeader, sections: Sequence[Section]) -> str:
    """The whole file."""
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.name}">{escape(section.name.capitalize())}</a>' for section in shown)
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(remark)}</small></dd></div>"
        for name, value, remark in head.figures
    )
    state, said = head.state
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(head.title)} · {escape(head.kind)}</title>
<style>
{_own("page.css")}</style>
</head>
<body>
<header>
<p class="kind">{escape(head.kind)}</p>
<h1>{escape(head.title)}</h1>
<p class="about">{escape(head.about)}</p>
<p class="state {state}"><b>{state}</b> {escape(said)}</p>
<div class="done"><div style="width:{100 * min(max(head.share, 0), 1):.1f}%"></div></div>
<dl class="figures">{figures}</dl>
</header>
<nav>{links}</nav>
<main>
{"".join(map(_section, shown))}</main>
<dialog><img alt=""><p></p></dialog>
<script>
{_own("page.js")}</script>
</body>
</html>
"""


def picture(pixels: np.ndarray, *, largest: int, caption: str) -> str:
    """uint8 (H, W, 3) -> an img element that holds its pixels; larger pictures are shrunk.

    Small ones keep every pixel, and show it; photographs of usual size become JPEG.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    small = max(image.size) <= 128
    image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 88}))
    kind = "png" if small else "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    named = escape(caption)
    grown = ' class="pixels"' if small else ""
    return (
        f'<img{grown} src="data:image/{kind};base64,{data}" width="{image.width}" height="{image.height}"'
        f' alt="{named}" title="{named}">'
    )


def table(rows: Sequence[tuple[str, str, str, bool]]) -> str:
    """(name, value, explanation, whether it is to be seen at once) -> two columns."""
    return (
        "<table>"
        + "".join(
            f'<tr{" class=told" if told else ""} title="{escape(explanation)}"><th scope="row">{escape(name)}</th>'
            f"<td>{escape(value)}</td></tr>"
            for name, value, explanation, told in rows
        )
        + "</table>"
    )


def _section(section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    return f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>{note}\n{section.body}\n</section>\n'


def _own(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
