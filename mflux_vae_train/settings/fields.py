"""Fields of settings dataclasses: each is a flag, a YAML key and a line of ``--help``, with its limits."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.paths import expand
from mflux_vae.utils.redaction import redacted


def flag(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    aliases: tuple[str, ...] = (),
    group: str | None = None,
    path: bool = False,
    **limits: Any,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        help: one line for ``--help``; the default is appended.
        default: without one the flag is required.
        choices: allowed strings; empty means any.
        least: smallest allowed number. Other limits: `above` (exclusive), `most`, `below` (exclusive).
        aliases: other names of the flag and the key.
        group: heading in ``--help`` for this flag and the following ones.
        path: the text is a path, or may be one: a leading ``~`` is the home folder.
    """
    metadata = {"help": help, "choices": choices, "least": least, "aliases": aliases, "group": group, **limits}
    metadata["path"] = path
    return dataclasses.field(default=default, metadata=metadata)


def hints_of(cls: type) -> Mapping[str, Any]:
    """Type hints of the fields of a settings class."""
    if cls not in _hints:
        _hints[cls] = typing.get_type_hints(cls)
    return _hints[cls]


_hints: dict[type, Mapping[str, Any]] = {}


@cache
def field_type(hint: Any) -> tuple[type, bool]:
    """Type hint of a field -> (type of the value or, for a tuple, of its members; whether None is allowed)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [k for k in typing.get_args(hint) if k is not type(None)]
        return field_type(kinds[0])[0], True
    return (typing.get_args(hint)[0] if is_tuple(hint) else hint), False


@cache
def is_tuple(hint: Any) -> bool:
    """Whether a field takes one or more values."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(is_tuple(member) for member in typing.get_args(hint))
    return typing.get_origin(hint) is tuple


def check_fields(settings: Any) -> None:
    """Check type, choices and limits of every field, and convert values as `check_value` does.

    Raises:
        SettingsError: names the flag, its value and the allowed ones.
    """
    hints = hints_of(type(settings))
    for field in dataclasses.fields(settings):
        value = check_value(field, hints[field.name], getattr(settings, field.name))
        object.__setattr__(settings, field.name, value)  # the dataclass is frozen


def check_value(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """The value of a field. Converts integers to floats, paths to text and lists to tuples, and expands ``~``.

    Raises:
        SettingsError: the value has the wrong type or is out of range; names the flag, its value and the allowed ones.
    """
    kind, optional = field_type(hint)
    if value is None and optional:
        return None
    members: Sequence[Any] = value if is_tuple(hint) and isinstance(value, list | tuple) else (value,)
    members = tuple(_converted(field, kind, member) for member in members)
    if not members or not all(_fits(field, kind, member) for member in members):
        raise SettingsError(f"--{field.name} is {shortened(repr(value), 100)}; {_allowed(field, kind, members)}")
    return members if is_tuple(hint) else members[0]


def _converted(field: dataclasses.Field[Any], kind: type, value: Any) -> Any:
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 10**300 else math.inf
    if kind is not str:
        return value
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str):
        return value
    if value.lower() in field.metadata.get("choices", ()):  # diffusers writes AdamW
        return value.lower()
    if redacted(value) != value:  # settings are written to files
        raise SettingsError(f"--{field.name} contains an access token; use `hf auth login` or HF_TOKEN instead")
    if field.metadata.get("path"):
        if not value and field.default != value:
            raise SettingsError(f"--{field.name} is empty; leave it out, or write . for this folder")
        return expand(value) if value else value
    try:  # a command line where the locale is not UTF-8
        return os.fsencode(value).decode()
    except UnicodeError:
        return value


def unused_settings(settings: Any, used_by: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, str]:
    """Settings without effect -> why.

    Args:
        used_by: for each choosing setting, such as `optimizer`: setting -> the choices that use it.
    """
    return {
        name: f"only for --{chosen} {', '.join(values)}, not {getattr(settings, chosen)}"
        for chosen, names in used_by.items()
        for name, values in names.items()
        if getattr(settings, chosen) not in values
    }


def ignored_settings(settings: Any, unused: Mapping[str, str]) -> list[str]:
    """One line for each setting that differs from its default and has no effect.

    Args:
        unused: settings without effect -> why.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return [
        f"--{name} has no effect: {why}" for name, why in unused.items() if getattr(settings, name) != defaults[name]
    ]


def is_valid_text(value: str) -> bool:
    """Whether a text has no NUL and no lone surrogates, which JSON and YAML allow but files do not."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_valid_path(value: str) -> bool:
    """Whether a file can have this name. Bytes that are not UTF-8 are lone surrogates."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _fits(field: dataclasses.Field[Any], kind: type, value: Any) -> bool:
    choices = field.metadata.get("choices")
    if type(value) is not kind or (choices and value not in choices):
        return False
    limits = [(holds, field.metadata[name]) for name, (_, holds) in _LIMITS.items() if name in field.metadata]
    number: Any = value
    if kind is str:
        return _is_valid_path(number) if field.metadata.get("path") else is_valid_text(number)
    if kind is float and not math.isfinite(number):
        return False
    return kind not in (int, float) or all(limit is None or holds(number, limit) for holds, limit in limits)


_LIMITS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def _allowed(field: dataclasses.Field[Any], kind: type, members: Sequence[Any]) -> str:
    if field.metadata.get("choices"):
        return "allowed are " + ", ".join(field.metadata["choices"])
    if kind is str and any(isinstance(member, bool | int | float) for member in members):
        return "text is allowed; put it in quotes"
    if kind is str and any(isinstance(member, str) for member in members):
        return "text in UTF-8 without NUL is allowed"
    noun = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
        kind, f"a {kind.__name__}"
    )
    limits = [
        f"{word} {field.metadata[name]}" for name, (word, _) in _LIMITS.items() if field.metadata.get(name) is not None
    ]
    return " ".join([noun, " and ".join(limits)]).strip() + " is allowed"
