"""Paths that users give."""

from __future__ import annotations

import os
import sys
import unicodedata
from pathlib import Path

from mflux_vae.errors import SettingsError


def expand(path: str) -> str:
    """A path with a leading ``~`` replaced by the home folder. The shell does not do so after ``=`` and in files.

    Raises:
        SettingsError: ``~name``, and there is no such user; or empty text, which is a variable of the shell without a
            value more often than this folder.
    """
    if not path:
        raise SettingsError("a path is empty; write . for this folder")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.split("/")[0]
        raise SettingsError(f"{path}: there is no user {user[1:]!r}; write ./{user} for a file of that name")
    return expanded


def printable(path: str | os.PathLike[str]) -> str:
    """A path for texts in UTF-8: bytes of its name that are not UTF-8 are written as ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def public_name(source: str) -> str:
    """How a published file names a model: of a path on this machine its last part, any other name as it is."""
    path = Path(source)
    return printable(path.resolve().name) if path.exists() else source


def file_name(text: str) -> str:
    """The file name, or path, that shows as a text: the inverse of `printable` for UTF-8, in any locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def same_place(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to the same file or folder: through links, or on a volume that ignores case.

    Paths that do not exist yet are the same if their parents are and their names have the same `name_key`.
    """
    try:
        return os.path.samefile(one, other)
    except OSError:
        if os.path.exists(one) or os.path.exists(other):
            return False
    paths = [Path(os.path.realpath(path)) for path in (one, other)]
    names = [name_key(path.name) for path in paths]
    return names[0] == names[1] and (not names[0] or same_place(paths[0].parent, paths[1].parent))


def name_key(name: str) -> str:
    """Text that is equal for names of the same file in one folder: macOS's volumes ignore case and normalization."""
    return unicodedata.normalize("NFC", name).casefold() if sys.platform == "darwin" else name
