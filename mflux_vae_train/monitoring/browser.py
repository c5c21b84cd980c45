"""Open a page in the user's browser, where there is one."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path


def open_page(path: Path) -> str | None:
    """Open a file in the browser.

    Returns:
        why it cannot be opened; None if it was. On a machine without a screen the module `webbrowser` would start a
        browser in the terminal.
    """
    if os.environ.keys() & {"SSH_CONNECTION", "SSH_TTY"}:
        return "this is a remote session"
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not screen:
        return "this machine has no screen"
    try:
        opened = webbrowser.open(path.resolve().as_uri())
    except (webbrowser.Error, OSError):
        opened = False
    return None if opened else "no browser was found"
