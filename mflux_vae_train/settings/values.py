"""Values of settings by field name, from files and from text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from mflux_vae.errors import SettingsError, did_you_mean
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.text_files import Table, parse_json_tables, read_text
from mflux_vae.utils.yaml_io import parse_yaml, read_yaml
from mflux_vae_train.settings.fields import check_value, field_type, hints_of, is_tuple

T = TypeVar("T")

Presets: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Preset name -> values of fields that replace the defaults."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A flag of other programs that would change the result.

    Attributes:
        reason: what to do instead.
        default: values that change nothing, which are accepted, beside none and false.
    """

    reason: str
    default: tuple[str, ...] = ()

    def check(self, value: Any, place: str) -> None:
        """
        Raises:
            SettingsError: the value is not a default.
        """
        if str(value).strip().lower() not in ("none", "null", "false", "no", "off", *self.default):
            raise SettingsError(f"{place}{self.reason}")


IgnoredFlags: TypeAlias = "Mapping[str, str | Refused]"
"""Flags of other programs, with or without values: name -> why they have no effect, or are refused."""

NONE: Mapping[str, Any] = {}

Translate: TypeAlias = Callable[[Mapping[Any, Any], Path], Mapping[Any, Any]]
"""(content of a settings file, the file) -> content with the names of this program."""

IGNORED = "ignored_flags"
"""Name of the list of ignored flags, in values and in the namespace of a command line: (name, value, where)."""

DERIVED = "derived"
"""Key of a settings file: a mapping with the settings that were derived from the others."""


class MissingSettings(SettingsError):
    """Settings without a default are not given."""


class Values(dict[str, Any]):
    """Values of a settings file by field name.

    Attributes:
        places: file and line of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}


def read_file(
    cls: type,
    path: Path,
    presets: Presets = NONE,
    ignored_flags: IgnoredFlags = NONE,
    translate: Translate | None = None,
) -> Values:
    content = _read_json(path) if _is_json(path) else read_yaml(path)
    if content is None:
        return Values()
    if not isinstance(content, dict):
        kind = "text" if isinstance(content, str) else f"a {type(content).__name__}"
        raise SettingsError(f"{path}: contains {kind}; expected 'name: value' lines")
    derived = content.pop(DERIVED, None)
    if translate is not None:
        content = translate(content, path)
    values = _by_field(cls, content, str(path), presets, ignored_flags)
    if derived is not None:
        if not isinstance(derived, dict):
            raise SettingsError(
                f"{path}: {DERIVED} contains {shortened(repr(derived), 100)}; expected 'name: value' pairs"
            )
        values[DERIVED] = _by_field(cls, derived, str(path))
    return values


def _is_json(path: Path) -> bool:
    """Whether a file is named as JSON or contains an object in JSON. YAML reads 1e-4 in it as text."""
    if path.suffix.lower() == ".json":
        return True
    with suppress(OSError, SettingsError, ValueError, RecursionError):
        text = read_text(path)
        return text.lstrip().startswith("{") and isinstance(parse_json_tables(text), dict)
    return False


def _read_json(path: Path) -> Any:
    try:
        return parse_json_tables(read_text(path))
    except FileNotFoundError as error:
        raise SettingsError(f"{path} does not exist; give a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not valid JSON ({error})") from error


def _by_field(
    cls: type,
    content: Mapping[Any, Any],
    where: str,
    presets: Presets = NONE,
    ignored_flags: IgnoredFlags = NONE,
) -> Values:
    """Content of a file by field name, checked; `where` is the file or flag, for messages."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    known = {name: field.name for field in fields.values() for name in (field.name, *field.metadata["aliases"])}
    hints = hints_of(cls)
    keys: dict[str, Any] = {}
    values = Values()
    for key, value in content.items():
        place = f"{_place(content, key, where)}: "
        name = str(key).replace("-", "_")
        if name in ignored_flags:
            values.setdefault(IGNORED, []).append((name, value, f"{place}{key}"))
            continue
        if name not in known and not (presets and name == "preset"):
            raise SettingsError(f"{place}unknown setting {shortened(repr(key), 100)}{did_you_mean(name, known)}")
        name = known.get(name, name)
        if name in keys:
            raise SettingsError(
                f"{place}{key!r} and {keys[name]!r} ({_place(content, keys[name], where)}) are one setting; keep one"
            )
        keys[name], values.places[name] = key, _place(content, key, where)
        if name not in fields:
            values[name] = value
            continue
        nested = dataclasses.is_dataclass(field_type(hints[name])[0])
        try:
            # YAML 1.1 reads 5e-6 as text, which is converted to the type of the field
            value = convert(cls, name, value, where)
            values[name] = check_value(fields[name], hints[name], value)
        except SettingsError as error:
            raise error if nested and str(error).startswith(where) else SettingsError(f"{place}{error}") from None
    return values


def _place(content: Mapping[Any, Any], key: Any, where: str) -> str:
    line = content.lines.get(key) if isinstance(content, Table) else None
    return where if line is None else f"{where}, line {line}"


def convert(cls: type, name: str, value: Any, where: str = "") -> Any:
    """Convert text to the type of a field. The dataclass checks the limits later."""
    hint = hints_of(cls)[name]
    kind, optional = field_type(hint)
    if is_tuple(hint):
        if value is None:
            return None
        members = value if isinstance(value, list | tuple) else [value]
        if kind in (int, float):  # numbers may be given as "32 64" or "32,64"; text is not split
            members = [part for member in members for part in _numbers(member)]
        return tuple(_member(kind, name, member, where) for member in members)
    if not isinstance(value, str) or kind is str:
        return value
    if optional and value.strip().lower() in ("none", "null", "auto"):
        return None
    return _member(kind, name, value, where)


def _numbers(member: Any) -> Sequence[Any]:
    return member.replace(",", " ").split() if isinstance(member, str) else [member]


_SPELLED = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBERS = {
    int: re.compile(r"[-+]?[0-9]+"),
    float: re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?inf|nan", re.IGNORECASE),
}
"""Python also takes 1_0 and digits of other scripts."""


def _member(kind: Any, name: str, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _nested(kind, name, value, where)
    if not isinstance(value, str) or kind is str:
        return value
    text = value.strip()
    if kind is bool and text.lower() in _SPELLED:
        return _SPELLED[text.lower()]
    if kind in _NUMBERS and _NUMBERS[kind].fullmatch(text):
        with suppress(ValueError):  # more digits than Python converts
            return kind(text)
    noun = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, kind.__name__)
    raise SettingsError(f"--{name} is {shortened(repr(value), 100)}; {noun} is allowed")


def _nested(cls: Any, name: str, value: Any, where: str) -> Any:
    """Nested settings from a mapping or its YAML."""
    content = parse_yaml(value, f"--{name}") if isinstance(value, str) else value
    place = where or f"--{name}"
    if not isinstance(content, dict):
        raise SettingsError(f"{place}: --{name} contains {shortened(repr(content), 100)}; expected 'name: value' pairs")
    begins = f"{place}: --{name}: " if place != f"--{name}" else f"--{name}: "
    if isinstance(content, Table) and content.lines and place == where:
        begins = f"{where}, line {min(content.lines.values())}: --{name}: "
    return build(cls, _by_field(cls, content, place), begins)


def build(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    required: Any = cls
    fields = [field.name for field in dataclasses.fields(required) if field.default is dataclasses.MISSING]
    missing = [name for name in fields if name not in values]
    missing += [
        name for name, other in getattr(cls, "NEEDED", {}).items() if not values.get(name) and values.get(other) is None
    ]
    if missing:
        if prefix == "--":
            raise MissingSettings(f"missing: {', '.join(f'--{name}' for name in missing)} (--help explains them)")
        raise SettingsError(f"{prefix}missing: {', '.join(missing)}")
    return cls(**values)
