"""Name symbolic links that lead nowhere, as in a copied snapshot of the hub's cache, whose files are links."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mflux_vae.errors import InputError
from mflux_vae.utils.formatting import first_few

log = logging.getLogger("mflux_vae")

REMEDY = "copy the files themselves, as cp -L does"


def missing(path: str | Path, otherwise: str = "does not exist", remedy: str = REMEDY) -> str:
    """Why there is no file or folder of this name: a link on the way that leads nowhere, or `otherwise`."""
    path = Path(path)
    for part in (path, *path.parents):
        if _leads_nowhere(part):
            what = "is" if part == path else f"lies below {part},"
            return f"{what} a link to {os.readlink(part)}, which is not there; {remedy}"
    return otherwise


@contextmanager
def naming_broken_links(place: str | Path) -> Iterator[None]:
    """Name the links in a folder that lead nowhere: in place of an error about its files, or in a warning, as a file
    that can be missing may be one of them.
    """
    try:
        yield
    except InputError as error:
        if "which is not there" in str(error) or not (text := _broken_text(place)):
            raise
        raise type(error)(text) from error
    if text := _broken_text(place):
        log.warning("%s", text)


def _broken_text(place: str | Path) -> str:
    broken = _broken_links(Path(place))
    listed = first_few([f"{link.relative_to(place)} -> {os.readlink(link)}" for link in broken], 1)
    count = "a link" if len(broken) == 1 else f"{len(broken)} links"
    return f"{place} holds {count} to a file which is not there ({listed}); {REMEDY}" if broken else ""


def _broken_links(folder: Path, depth: int = 2) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    broken = [entry for entry in entries if _leads_nowhere(entry)]
    if depth:
        broken += [link for entry in entries if entry.is_dir() for link in _broken_links(entry, depth - 1)]
    return broken


def _leads_nowhere(path: Path) -> bool:
    try:
        return path.is_symlink() and not path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False
