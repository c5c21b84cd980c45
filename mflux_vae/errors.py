"""Exceptions of the project.

    MfluxVaeError
    ├── InputError            bad input: a command exits with status 2
    │   ├── SettingsError     a flag, a configuration file or a combination of settings
    │   ├── ImageError        an unreadable image file, or an array of the wrong shape or range
    │   ├── WeightsError      missing, unknown or misshapen tensors; a broken weights file
    │   ├── BackendError      MLX cannot be imported or is too old (an ImportError, too)
    │   └── PluginError       an entry point that cannot be loaded, or a name taken twice
    └── RunError              a failure: a command exits with status 1
        ├── DeviceError       MLX's device ran out of memory or failed (`runtime.device_errors` translates its errors)
        └── TrainingError     loss not finite, nothing learns, a checkpoint that cannot be restored

Messages are one line: what is wrong, where, and what to do. Line breaks in messages of libraries are removed, and
access tokens are redacted. Messages name the first few of many faults (`utils.formatting`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.redaction import redacted

_LONGEST = 1000
"""Characters of a message, as a last resort."""


class MfluxVaeError(Exception):
    """Base class."""

    exit_code = 1

    def __init__(self, message: str = "", *rest: object) -> None:
        line = " ".join(redacted(message).splitlines())
        super().__init__(shortened(line, _LONGEST), *rest)


class InputError(MfluxVaeError):
    """Input cannot be used."""

    exit_code = 2


class SettingsError(InputError):
    """A flag, a configuration file or a combination of settings is wrong."""


class ImageError(InputError):
    """An image file cannot be read, or an array has the wrong shape or range."""


class WeightsError(InputError):
    """Tensors are missing, unknown or misshapen, or a weights file is broken."""


class BackendError(InputError, ImportError):
    """MLX cannot be imported, or is too old."""


class PluginError(InputError):
    """An entry point cannot be loaded, or two have the same name."""


class RunError(MfluxVaeError):
    """The work failed."""


class DeviceError(RunError):
    """MLX's device ran out of memory or failed.

    Args:
        problem: what failed.
        cure: what to do.
        kept: what is saved of the work.
        memory: whether memory ran out.
    """

    def __init__(self, problem: str, *, cure: str = "", kept: str = "", memory: bool = False) -> None:
        super().__init__("; ".join(part for part in (problem, cure, kept) if part))
        self.parts = {"problem": problem, "cure": cure, "kept": kept}
        self.memory = memory

    def but(self, **parts: str) -> DeviceError:
        """The same error with another `problem`, `cure` or `kept`."""
        return type(self)(memory=self.memory, **{**self.parts, **parts})


class TrainingError(RunError):
    """Training cannot go on, or a checkpoint cannot be restored."""


@contextmanager
def collecting(errors: list[InputError] | None) -> Iterator[None]:
    """Append an `InputError` of the block to a list; None raises it."""
    try:
        yield
    except InputError as error:
        if errors is None:
            raise
        errors.append(error)


def did_you_mean(word: str, known: Iterable[str], dashes: str = "") -> str:
    """Suffix for a message about an unknown name: the nearest known one with `dashes` in front, or an empty string."""
    names = sorted(known)
    within = [name for name in names if word in name] if len(word) > 2 else []
    near = difflib.get_close_matches(word, names, n=1) or difflib.get_close_matches(word, within, n=1, cutoff=0)
    return f"; did you mean {dashes}{near[0]}?" if near else ""
