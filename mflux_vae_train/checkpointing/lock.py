"""One process at a time in a folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import TracebackType

from mflux_vae.errors import SettingsError

logger = logging.getLogger(__name__)


class Lock:
    """Held within a `with` block, or from `acquire` on where the folder is made only then.

    It is the system's lock on the folder itself: no file is written, and it is gone with the process that held it,
    however that one ended. Where the file system knows no locks, nothing is locked.

    Raises:
        SettingsError: another process holds it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handle: int | None = None

    def acquire(self) -> None:
        """Lock the folder if it is there; once is enough."""
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
                f"{self.folder}: another process is at work in this folder; wait for it, or give another --output_dir"
            ) from error
        except OSError as error:
            os.close(handle)
            logger.debug("%s: not locked (%s)", self.folder, error)
        else:
            self._handle = handle

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
