"""Who gave a setting: a flag or a file. Of two settings for one quantity the flag replaces the file's.

A settings class may have these attributes:

- `REPLACES`: pairs (names, others). Flags for all of `names` replace `others` of a file.
- `EXCLUSIVE`: pairs of settings for one quantity, which may not both be flags, or both be in a file.
- `COMPUTED`: name -> another. A file with all settings has both, the first one computed from the other.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae_train.settings.values import Values

_ATTRIBUTE, _UNUSED = "_origins", "_unused"
_ONLY_WRITTEN = {"dry_run", "allow_changes"}
"""Settings that a file with all settings has; nobody writes both by hand."""


def origins_of(settings: Any) -> Mapping[str, str]:
    """Where given settings come from: name -> the flag, or file and line. Empty unless a command line was parsed."""
    return getattr(settings, _ATTRIBUTE, {})


def unused_of(settings: Any) -> Sequence[str]:
    """One line for each flag and setting of a file that was not used; empty unless a command line was parsed."""
    return getattr(settings, _UNUSED, ())


def set_origins(settings: Any, flags: Mapping[str, Any], file: Values, unused: Sequence[str]) -> None:
    """Record where the settings come from, and what was not used."""
    places = {name: file.places[name] for name in file if name in file.places}
    object.__setattr__(settings, _ATTRIBUTE, {**places, **{name: f"--{name}" for name in flags}})  # it is frozen
    object.__setattr__(settings, _UNUSED, tuple(unused))


def places_of(message: str, flags: Mapping[str, Any], file: Values) -> str:
    """Suffix for a message: where the file has the settings that it names."""
    named = [name for name in dict.fromkeys(re.findall(r"--(\w+)", message)) if name in file and name not in flags]
    return f" ({', '.join(f'{name}: {file.places[name]}' for name in named)})" if named else ""


def settle_spellings(cls: Any, flags: Mapping[str, Any], file: Values) -> list[str]:
    """Remove settings from a file that flags replace under another name.

    Returns:
        one line for each replacement.

    Raises:
        SettingsError: two settings for one quantity are flags, or in the file.
    """
    for name, other in getattr(cls, "COMPUTED", {}).items():
        if file.keys() >= _ONLY_WRITTEN and file.get(other) is not None:
            file.pop(name, None)
    lines = []
    for names, others in getattr(cls, "REPLACES", ()):
        replaced = [name for name in others if file.get(name) is not None and name not in flags]
        if replaced and all(_is_given(cls, name, flags) for name in names):
            found = ", ".join(f"{name} ({file.places[name]})" for name in replaced)
            lines.append(f"not used: {found}; {' and '.join(f'--{name}' for name in names)} replaces it")
            for name in replaced:
                del file[name]
    for pair in getattr(cls, "EXCLUSIVE", ()):
        for given in (flags, {} if file.keys() >= _ONLY_WRITTEN else file):
            if all(given.get(name) is not None for name in pair):
                both = " and ".join(f"--{name}" for name in pair)
                raise SettingsError(f"{both} set the same quantity; give one of them{places_of(both, flags, file)}")
    return lines


def _is_given(cls: Any, name: str, flags: Mapping[str, Any]) -> bool:
    """Whether there is a flag with a value other than none, or than "off" for what is off by default."""
    default = next(field.default for field in dataclasses.fields(cls) if field.name == name)
    return flags.get(name) is not None and (flags[name] is not False or default is not False)
