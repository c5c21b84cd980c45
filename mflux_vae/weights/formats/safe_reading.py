"""Convert every exception while reading a damaged file to a one-line WeightsError."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mflux_vae.errors import WeightsError
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.links import missing


class InvalidFile(Exception):
    """A file is not acceptable; the message says why."""


BROKEN: tuple[type[Exception], ...] = (
    *(InvalidFile, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, Warning),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""Exceptions that damaged files cause in readers."""


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Context of reading a file of a kind, such as "a torch file".

    Raises:
        WeightsError: the file is missing, damaged or refused.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: {missing(path, 'no such weights file')}") from error
    except BROKEN as error:
        reason = (
            str(error) if isinstance(error, InvalidFile) else f"broken or truncated: {error or type(error).__name__}"
        )
        raise WeightsError(f"{path}: not readable as {kind} ({shortened(reason, 220)})".replace("\n", " ")) from error
