"""Read text and JSON files of users and of other programs."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mflux_vae.errors import InputError, SettingsError

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # starts with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_SAVE = "save it as UTF-8"


def read_text(path: str | Path, error: type[InputError] = SettingsError) -> str:
    """Read a text file in UTF-8, with or without a byte order mark. Lines of the result end with "\\n" alone.

    Split the result with ``split("\\n")``: `str.splitlines` also splits at characters that JSON allows inside a text,
    such as U+2028 and U+0085.

    Raises:
        FileNotFoundError: there is no such file.
        error: the file cannot be read, is in another encoding, or is no text. The message names file and fix.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as failure:  # ValueError: NUL in the path
        raise error(f"{path}: cannot be read ({getattr(failure, 'strerror', None) or failure})") from failure
    for mark, name in _MARKS:
        if content.startswith(mark):
            raise error(f"{path}: is {name}; {_SAVE}")
    if b"\0" in content:
        raise error(f"{path}: {_describe_nul(content)}; {_SAVE}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = content.count(b"\n", 0, failure.start) + 1
        found = f"line {line} holds the byte 0x{content[failure.start]:02x}, which is not UTF-8"
        raise error(f"{path}: {found} (cp1252 or Latin-1?); {_SAVE}") from failure
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _describe_nul(content: bytes) -> str:
    """Text with a NUL byte: UTF-16 without a mark has them at every other place."""
    halves = content[0::2], content[1::2]
    most, least = sorted((half.count(0) / max(1, len(half)) for half in halves), reverse=True)
    if most > 0.3 and least < 0.1:
        return "is UTF-16 without a byte order mark"
    line = content.count(b"\n", 0, content.index(b"\0")) + 1
    return f"line {line} holds a NUL byte, which no text does"


class Table(dict[Any, Any]):
    """A mapping from a file.

    Attributes:
        lines: line of each key, from 1; keys that come from elsewhere are absent.
    """

    def __init__(self, content: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (), lines: Mapping[Any, int] = {}):
        super().__init__(content)
        self.lines = dict(lines)


def parse_json(text: str, *, parse_number: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text in which no object has a key twice.

    Args:
        parse_number: converts numbers with a point or an exponent, NaN and infinity.

    Raises:
        ValueError, RecursionError: not valid JSON, or a key twice. The message names line and key.
    """

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(content := dict(pairs)) < len(pairs):
            deque(_key_lines(text), maxlen=0)  # raises
        return content

    return json.loads(text, object_pairs_hook=build, parse_float=parse_number, parse_constant=parse_number)


def parse_json_tables(text: str) -> Any:
    """As `parse_json`, with objects as tables that know the lines of their keys."""
    parse_json(text)
    lines = _key_lines(text)
    return json.loads(text, object_pairs_hook=lambda pairs: Table(pairs, next(lines)))


_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]')


def _key_lines(text: str) -> Iterator[dict[str, int]]:
    """Lines of the keys of each object of a valid JSON text, in the order in which the objects end.

    Raises:
        ValueError: a key twice in one object.
    """
    objects: list[dict[str, int]] = []
    line, end = 1, 0
    for token in _TOKEN.finditer(text):
        line, end = line + text.count("\n", end, token.start()), token.start()
        if token[0] == "{":
            objects.append({})
        elif token[0] == "}":
            yield objects.pop()
        elif token[2]:
            key = json.loads(token[1])
            if key in objects[-1]:
                raise ValueError(f"line {line}: {key[:100]!r} stands in line {objects[-1][key]}, too; keep one")
            objects[-1][key] = line
