"""Readers of files from outside, as functions of the bytes, what they must not do, and how files are broken.

What a target may raise is the project's own error. `watched` finds other exceptions, and what no input may cause: files
opened outside of the folder that was named, programs started, code run, connections made, memory that a small file
fills.
"""

from __future__ import annotations

import random
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux_vae.errors import MfluxVaeError

FILE_TIMES, BASE_BYTES, PICTURE_BYTES = 64, 96 * 2**20, 2**30
"""Memory that reading may take: so many times the file, and as much as this for the libraries at work. A picture takes
what its pixels take: five bytes each, 179 million of them where Pillow refuses more."""

_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
)


class Crossed(Exception):
    """An input made its reader do what no input may."""


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        file: name of the file that the bytes go to.
        seeds: good files to begin from.
        read: folder -> None; the file lies in it.
        beside: files that stand there, too.
        base: bytes of memory that reading may take whatever the file's size.
    """

    file: str
    seeds: Sequence[bytes]
    read: Callable[[Path], object]
    beside: Sequence[tuple[str, bytes]] = ()
    base: int = BASE_BYTES

    def __call__(self, content: bytes, folder: Path, *, good: bool = False) -> None:
        """Reads the bytes; an error of the project's own is an answer, unless they are to be good."""
        for name, beside in self.beside:
            _put(folder / name, beside)
        _put(folder / self.file, content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.read(folder)
            except MfluxVaeError as error:
                if good:
                    raise
                if "\n" in str(error):
                    raise Crossed(f"an error of several lines: {error!r}") from error


def watched(target: Target, content: bytes, folder: Path) -> None:
    """Calls it.

    Raises:
        Crossed: it opened what lies elsewhere, started something, or connected to somewhere.
        Exception: whatever the reader let through.
    """
    _Watch.begin(folder)
    try:
        target(content, folder)
    finally:
        crossed = _Watch.end()
    if crossed:
        raise Crossed(f"{target.file}: {crossed[0]}")


class _Watch:
    """One audit hook, which cannot be taken out again; it looks at the thread that asks for it."""

    _state = threading.local()
    _there = False

    @classmethod
    def begin(cls, folder: Path) -> None:
        if not cls._there:
            sys.addaudithook(cls._seen)
            cls._there = True
        cls._state.folder, cls._state.crossed = str(folder), []

    @classmethod
    def end(cls) -> list[str]:
        crossed, cls._state.folder = cls._state.crossed, None
        return crossed

    @classmethod
    def _seen(cls, event: str, arguments: tuple[Any, ...]) -> None:
        folder = getattr(cls._state, "folder", None)
        if folder is None:
            return
        if event in _FORBIDDEN and not _importing():
            cls._state.crossed.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str):
            packages = (path for path in sys.path if path)  # where libraries look for each other's metadata
            usual = arguments[0].startswith((folder, sys.prefix, sys.base_prefix, "/proc/", "/sys/", *packages))
            if not usual and not _importing():
                cls._state.crossed.append(f"opened {arguments[0]}")


def _importing() -> bool:
    """Whether a module is being imported: libraries import parts of themselves when they first need them."""
    frame = sys._getframe(1)
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


WORDS = (
    *(b"../../etc/passwd", b"/etc/passwd", b"\x00", b"\xff\xfe", b"NaN", b"1e999", b"-1", b"9" * 5000, b"null", b"{}"),
    *(b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b"&a [*a, *a]", b"!!python/object/apply:os.system [id]", b"\\ud800"),
    *(b"\xff" * 8, (2**31 - 1).to_bytes(4, "little"), (2**62).to_bytes(8, "little"), b"2" * 9, b"true", b'""', b"\n"),
)
"""What mutations put into a file."""


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A file that was good: one or a few places of it changed, left out, doubled, or replaced by something bad."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        start = chance.randrange(len(changed) + 1)
        length = chance.choice((0, 1, 1, 2, 4, 8, 40, len(changed)))
        match chance.randrange(6):
            case 0 if changed:
                changed[start % len(changed)] ^= 1 << chance.randrange(8)
            case 1:
                del changed[start : start + length]
            case 2:
                del changed[start:]
            case 3:
                changed[start:start] = changed[start : start + length]
            case 4:
                changed[start : start + length] = chance.choice(WORDS)
            case _:
                changed = _value_replaced(changed, chance)
    return bytes(changed)


def _value_replaced(text: bytearray, chance: random.Random) -> bytearray:
    """A number, a word or a string of a text, as a whole."""
    places = list(re.finditer(rb'"[^"]*"|[-\d.e]+|\w+', text))
    if not places:
        return text
    place = chance.choice(places)
    return text[: place.start()] + chance.choice(WORDS) + text[place.end() :]
