"""Text labels for contact sheets."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIZE, _LINE = 14, 18
"""Font size and line height, pixels."""

_NO_LETTER = "\uffff"
"""Never a letter in Unicode, so no font has it."""


def caption(lines: Sequence[str], width: int) -> np.ndarray:
    """Draw centred lines, black on white, as `drawable`: uint8 (H, width, 3). Long lines are elided in the middle."""
    font = _font()
    canvas = Image.new("RGB", (width, _LINE * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, line in enumerate(map(drawable, lines)):
        kept = len(line)
        while kept and font.getlength(text := _elide(line, kept)) > width:
            kept -= 1
        draw.text((width / 2, _LINE * (index + 0.5)), text if kept else "", fill="black", font=font, anchor="mm")
    return np.array(canvas)


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Break text at spaces into lines of this width for `caption`, at most so many; the last one has the rest."""
    font = _font()
    words, lines = drawable(text).split(), [""]
    for index, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] = " ".join([lines[-1], *words[index:]])
            break
    return lines


def drawable(text: str) -> str:
    """Text in letters of the font, which has few beyond ASCII: "u" for "ü" in either spelling, "?" for "猫"."""
    return "".join(map(_drawable, unicodedata.normalize("NFC", text)))


@cache
def _drawable(letter: str) -> str:
    plain = unicodedata.normalize("NFKD", letter)
    return next((form for form in (letter, plain) if _has_all(form)), "".join(filter(_has_all, plain)) or "?")


def _has_all(letters: str) -> bool:
    """Whether the font has a glyph of each letter: one that differs from the box for a missing glyph."""
    masks = [bytes(_font().getmask(letter)) for letter in (_NO_LETTER, *letters)]
    return letters.isprintable() and masks[0] not in masks[1:]


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_SIZE)


def _elide(text: str, kept: int) -> str:
    if kept >= len(text):
        return text
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
