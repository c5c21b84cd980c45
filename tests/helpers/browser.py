"""A headless Chromium, if one is installed, driven through a pipe by the DevTools protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def find() -> str | None:
    """The program of a browser."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Failed(Exception):
    """The browser refused a command, for example as the page is loading."""


class Browser:
    """A context manager with one page.

    Args:
        home: empty folder for the browser's profile.
    """

    def __init__(self, program: str, home: Path) -> None:
        self._command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
            *("--disable-dev-shm-usage", f"--user-data-dir={home}", "--window-size=900,700", "about:blank"),
        ]
        self._count, self._session = 0, ""

    def __enter__(self) -> Browser:
        (reads, self._to), (self._from, writes) = os.pipe(), os.pipe()

        def connect() -> None:
            """The browser reads from 3 and writes to 4."""
            one, other = os.dup(reads), os.dup(writes)
            os.dup2(one, 3)
            os.dup2(other, 4)

        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "close_fds": False}
        self._process = subprocess.Popen(self._command, preexec_fn=connect, **options)
        os.close(reads)
        os.close(writes)
        self._replies = os.fdopen(self._from, "rb")
        self._rest = b""
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        attach = {"targetId": target["targetId"], "flatten": True}
        self._session = self.call("Target.attachToTarget", **attach)["sessionId"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        self._replies.close()

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self._read())
            if reply.get("id") == self._count:
                if "error" in reply:
                    raise Failed(reply["error"]["message"])
                return reply["result"]

    def _read(self) -> bytes:
        while b"\0" not in self._rest:
            more = os.read(self._from, 1 << 16)
            assert more, "the browser ended"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        return text

    def open(self, path: Path) -> None:
        """Go to the page in a file."""
        self.call("Page.navigate", url=path.as_uri())
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise Failed(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> None:
        """Until the expression is true in the page, which may load itself again meanwhile."""
        end = time.monotonic() + seconds
        while True:
            with suppress(Failed):
                if self.value(expression):
                    return
            assert time.monotonic() < end, expression
            time.sleep(0.05)
