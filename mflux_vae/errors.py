"""Every error this project raises on purpose.

    MfluxVaeError
    ├── InputError            the user's mistake: a command line exits 2
    │   ├── SettingsError     a flag, a configuration file, a combination of settings
    │   ├── ImageError        a picture that cannot be read, or an array of the wrong shape or range
    │   ├── WeightsError      missing, unknown or misshapen tensors; a broken or foreign weights file
    │   ├── BackendError      MLX cannot be imported or is too old (an ImportError, too)
    │   └── PluginError       an entry point that cannot be loaded, or a name taken twice
    └── RunError              the work failed: a command line exits 1
        └── TrainingError     loss not finite, nothing learns, a checkpoint that cannot be restored

Messages are one line: what is wrong, where, and what to do about it. What libraries told in several lines stands in it;
access tokens that the hub or an address put there are left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mflux_vae.utils.redaction import redacted


class MfluxVaeError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1

    def __init__(self, message: str = "", *rest: object) -> None:
        super().__init__(" ".join(redacted(message).splitlines()), *rest)


class InputError(MfluxVaeError):
    """What the user gave cannot be used."""

    exit_code = 2


class SettingsError(InputError):
    """A flag, a configuration file or a combination of settings is wrong."""


class ImageError(InputError):
    """A picture cannot be read, or an image array has the wrong shape or range."""


class WeightsError(InputError):
    """Tensors are missing, unknown or misshapen, or a weights file is broken."""


class BackendError(InputError, ImportError):
    """MLX cannot be imported, or is too old."""


class PluginError(InputError):
    """An entry point cannot be loaded, or two carry the same name."""


class RunError(MfluxVaeError):
    """The work itself failed."""


class TrainingError(RunError):
    """Training cannot go on, or a checkpoint cannot be restored."""


def did_you_mean(word: str, known: Iterable[str], dashes: str = "") -> str:
    """End of a message about a name that there is not: the nearest one that there is, after `dashes`; or nothing."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {dashes}{near[0]}?" if near else ""
