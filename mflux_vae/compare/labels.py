"""Text labels for contact sheets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIZE, _LINE = 14, 18
"""Font size and line height, pixels."""


def caption(lines: Sequence[str], width: int) -> np.ndarray:
    """Draw centred lines, black on white: uint8 (H, width, 3). Long lines are elided in the middle."""
    font = ImageFont.load_default(size=_SIZE)
    canvas = Image.new("RGB", (width, _LINE * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, line in enumerate(lines):
        kept = len(line)
        while kept and font.getlength(text := _elide(line, kept)) > width:
            kept -= 1
        draw.text((width / 2, _LINE * (index + 0.5)), text if kept else "", fill="black", font=font, anchor="mm")
    return np.array(canvas)


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Break text at spaces into lines of this width for `caption`, at most so many; the last one has the rest."""
    font = ImageFont.load_default(size=_SIZE)
    words, lines = text.split(), [""]
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


def _elide(text: str, kept: int) -> str:
    if kept >= len(text):
        return text
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
