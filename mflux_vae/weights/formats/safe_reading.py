"""Files that are not what they say: whatever reading one raises becomes one line."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mflux_vae.errors import WeightsError


class Refused(Exception):
    """What is wrong with a file."""


BROKEN: tuple[type[Exception], ...] = (
    *(Refused, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(SyntaxError, TypeError, ValueError, Warning),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)
"""What reading a file that is not what it says may raise."""


@contextmanager
def told(path: Path, kind: str) -> Iterator[None]:
    """While a file is read that should be of a kind, such as "a torch file".

    Raises:
        WeightsError: for whatever is wrong with it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such weights file") from error
    except BROKEN as error:
        reason = str(error) if isinstance(error, Refused) else f"broken or truncated: {error or type(error).__name__}"
        raise WeightsError(f"{path}: not usable as {kind} ({reason})".replace("\n", " ")) from error
