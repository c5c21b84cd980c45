"""A lock on a folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mflux_vae.errors import SettingsError

logger = logging.getLogger(__name__)


class Lock:
    """Excludes other processes from a folder, within a `with` block or from `acquire` until the end of the block.

    Uses the operating system's lock on the folder itself: no file is written, and the lock ends with its process. Does
    nothing on file systems without locks.

    Raises:
        SettingsError: another process holds the lock.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Lock the folder if it exists; may be called again."""
        if self._handle is not None or not self.folder.is_dir():
            return
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise SettingsError(
                f"{self.folder}: another process is using this folder; wait for it or use another --output_dir"
            ) from error
        except OSError as error:
            os.close(handle)
            logger.debug("%s: not locked (%s)", self.folder, error)
        else:
            self._handle = handle

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
