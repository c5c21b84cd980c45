"""What was ignored or converted when images were read, collected into one line of each kind."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from mflux_vae.utils.formatting import first_few, shortened


class Kind(NamedTuple):
    """What happened to images, as the start of a line.

    Attributes:
        text: may have {} for the details of the images, in which they differ.
        level: of the line.
    """

    text: str
    level: int


CONVERTED = Kind("colours converted to sRGB from {}", logging.INFO)
BROKEN_PROFILE = Kind("colour profile unusable, so colours are taken as sRGB ({})", logging.WARNING)
INKS = Kind("CMYK without a colour profile, so colours are approximate", logging.WARNING)
FRAMES = Kind("several frames or pages, of which the first is used", logging.WARNING)
TRANSPARENT = Kind("transparency laid over white", logging.INFO)
CLIPPED = Kind("values outside [0, 65535], which are clipped", logging.WARNING)
UNIFORM_MASK = Kind("mask of one level, so it weighs all positions the same", logging.WARNING)
ENLARGED = Kind("smaller than the training images, so enlarged", logging.WARNING)
PILLOW = Kind("{}", logging.WARNING)

_ORDER = (BROKEN_PROFILE, INKS, FRAMES, CLIPPED, UNIFORM_MASK, ENLARGED, PILLOW, CONVERTED, TRANSPARENT)

_MAX_DETAIL = 120


class ImageNotes:
    """Notes about images; any thread may add some."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._images: dict[Kind, dict[str, str]] = {}
        self._logged: set[Kind] = set()

    def add(self, kind: Kind, image: str | Path, detail: str = "") -> None:
        with self._lock:
            self._images.setdefault(kind, {})[str(image)] = detail[:_MAX_DETAIL]

    def lines(self, level: int) -> list[str]:
        """One line for each kind of this level."""
        return [self._line(kind) for kind in _ORDER if kind.level == level and kind in self._images]

    @property
    def warnings(self) -> list[str]:
        return self.lines(logging.WARNING)

    def log(self, logger: logging.Logger) -> None:
        for level in (logging.WARNING, logging.INFO):
            for line in self.lines(level):
                logger.log(level, "%s", line)

    def log_first(self, logger: logging.Logger) -> None:
        """Log the first image of each kind and forget the others, which may be millions."""
        with self._lock:
            new = self._images.keys() - self._logged
            lines = [(kind.level, self._line(kind)) for kind in _ORDER if kind in new]
            self._logged |= new
            self._images.clear()
        for level, line in lines:
            logger.log(level, "%s; further images are not named", line)

    def _line(self, kind: Kind) -> str:
        images = self._images[kind]
        several = len(images) > 1
        names = [_printable(Path(name).name if several else name) for name in sorted(images)]
        details = first_few(sorted({_printable(detail) for detail in images.values() if detail}), 2, 60)
        return f"{first_few(names, 3, 40) if several else shortened(names[0], 120)}: {kind.text.format(details)}"


def _printable(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
