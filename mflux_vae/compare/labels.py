"""Text on sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SIZE, _LINE = 14, 18
"""Of letters, and from line to line, in pixels."""


def caption(lines: Sequence[str], width: int) -> np.ndarray:
    """Lines in black on white, centred; one that is too long loses its middle. uint8 (H, width, 3)."""
    font = ImageFont.load_default(size=_SIZE)
    canvas = Image.new("RGB", (width, _LINE * len(lines)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, line in enumerate(lines):
        kept = len(line)
        while kept and font.getlength(text := _shortened(line, kept)) > width:
            kept -= 1
        draw.text((width / 2, _LINE * (index + 0.5)), text if kept else "", fill="black", font=font, anchor="mm")
    return np.array(canvas)


def _shortened(text: str, kept: int) -> str:
    if kept >= len(text):
        return text
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
