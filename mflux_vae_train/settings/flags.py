"""A settings dataclass as a command line and as YAML. The dataclass is the only definition of a setting.

Flags are spelled like fields, ``--train_batch_size``, or with hyphens. A flag on the command line overrides
``--config run.yaml``, which overrides ``--preset name``, which overrides the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

from mflux_vae.errors import SettingsError, did_you_mean
from mflux_vae.utils.command_line import check_spellings
from mflux_vae.utils.paths import expand
from mflux_vae.utils.text_files import Table, parse_json_tables, read_text
from mflux_vae.utils.yaml_io import parse_yaml, read_yaml
from mflux_vae_train.settings.fields import check_value, field_type, is_tuple

T = TypeVar("T")

logger = logging.getLogger(__name__)

Presets: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Preset name -> values of fields that replace the defaults."""

IgnoredFlags: TypeAlias = Mapping[str, str]
"""Flags of other programs that are accepted, with or without a value, and ignored: name -> reason."""

_NONE: Mapping[str, Any] = {}

Translate: TypeAlias = Callable[[Mapping[Any, Any], str], Mapping[Any, Any]]
"""(content of a settings file, beginning of error messages) -> content with the names of this program."""

SHORT_USAGE = "%(prog)s [--flag value ...]"
"""Short, as a list of all flags would fill the screen."""

METAVARS = {str: "TEXT", int: "N", float: "X", bool: None}
"""Nested settings are given as YAML."""

IGNORED = "ignored_flags"
"""Attribute of a namespace that lists the ignored flags on the command line."""


class _AppendIgnored(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, value: Any, word: str | None = None) -> None:
        setattr(namespace, IGNORED, [*getattr(namespace, IGNORED, ()), self.dest])


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        check_spellings(self, words)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (--help lists all flags)")


def parser_from(
    cls: type,
    *,
    prog: str | None = None,
    description: str | None = None,
    ignored_flags: IgnoredFlags = _NONE,
) -> argparse.ArgumentParser:
    """An argument parser with ``--config`` and one flag per field of `cls`; ``--help`` ends with `ignored_flags`.

    Flags that are not given are absent from the namespace. A boolean field ``x`` gives ``--x``, optionally followed by
    true or false, and ``--no_x``. Numbers that may be None accept ``none`` and ``auto``.

    Raises (when parsing):
        SettingsError: an unknown flag or an invalid value; nothing is printed.
    """
    names = ", ".join(f"--{name}" for name in ignored_flags)
    epilog = f"Accepted and ignored, with a log line that says why: {names}." if names else None
    parser = _Parser(prog=prog, usage=SHORT_USAGE, description=description, epilog=epilog, allow_abbrev=False)
    add_flags(parser, cls)
    for name in ignored_flags:
        spellings, hidden = _spellings(name), argparse.SUPPRESS
        parser.add_argument(*spellings, action=_AppendIgnored, nargs="?", default=hidden, help=hidden)
    return parser


def add_flags(parser: argparse.ArgumentParser, cls: type, presets: Presets = _NONE) -> None:
    """Add the flags of `parser_from` to a parser, and ``--preset`` if there are presets."""
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--config", metavar="FILE", help="YAML file of settings; flags override it")
    if presets:
        add("--preset", metavar="{" + ",".join(presets) + "}", help="a set of defaults; --config and flags override it")
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if heading := field.metadata.get("group"):
            add = functools.partial(parser.add_argument_group(heading).add_argument, default=argparse.SUPPRESS)
        kind, _ = field_type(hints[field.name])
        text = field.metadata["help"].replace("%", "%%") + _default_text(field)
        choices, aliases = field.metadata["choices"], field.metadata["aliases"]
        metavar = "{" + ",".join(choices) + "}" if choices else METAVARS.get(kind, "YAML")
        if aliases:
            text += f" (also {', '.join(f'--{alias}' for alias in aliases)})"
        names = [spelling for name in (field.name, *aliases) for spelling in _spellings(name)]
        for i, name in enumerate(names):
            shown = argparse.SUPPRESS if i else text
            if kind is bool:
                add(name, dest=field.name, nargs="?", const=True, metavar="true|false", help=shown)
            elif is_tuple(hints[field.name]):
                add(name, dest=field.name, metavar=metavar, nargs="+", action="extend", help=shown)
            else:
                add(name, dest=field.name, metavar=metavar, help=shown)
        if kind is bool:
            negative = f"no_{field.name}"
            for i, name in enumerate(_spellings(negative) if field.default is not False else []):
                shown = argparse.SUPPRESS if i else f"the opposite of --{field.name}"
                add(name, dest=field.name, action="store_false", help=shown)


def settings_from(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    ignored_flags: IgnoredFlags = _NONE,
    **parser_options: Any,
) -> T:
    """Settings from a command line (None: ``sys.argv``), which overrides ``--config``.

    Logs a warning for each of `ignored_flags` on the command line or in the file.

    Raises:
        SettingsError: an unknown flag or key (with the closest known one), a missing required flag, or a value that the
            dataclass refuses.
    """
    parser = parser_from(cls, ignored_flags=ignored_flags, **parser_options)
    namespace, unknown = parser.parse_known_args(argv)
    known = set(typing.get_type_hints(cls))
    for word in unknown:
        if word.startswith("-"):
            flag = word.split("=")[0]
            hint = did_you_mean(flag.lstrip("-").replace("-", "_"), known | {"config"}, "--")
            raise SettingsError(f"unknown flag {flag}{hint} (--help lists all flags)")
        raise SettingsError(f"{word!r} follows no flag; quote a value that contains spaces")
    return settings_of(cls, vars(namespace), ignored_flags=ignored_flags)


def settings_of(
    cls: type[T],
    given: Mapping[str, Any],
    presets: Presets = _NONE,
    ignored_flags: IgnoredFlags = _NONE,
    translate: Translate | None = None,
) -> T:
    """Settings from the namespace of a parser with `add_flags`; `translate` reads files of other programs.

    Raises:
        SettingsError: as `settings_from`, or an unknown preset.
    """
    given = dict(given)
    config, preset, ignored = given.pop("config", None), given.pop("preset", None), given.pop(IGNORED, [])
    in_file = _read_file(cls, Path(expand(config)), presets, ignored_flags, translate) if config else {}
    for name in [*in_file.pop(IGNORED, []), *ignored]:
        logger.warning("--%s has no effect: %s", name, ignored_flags[name])
    preset_in_file = in_file.pop("preset", None)
    preset = preset_in_file if preset is None else preset
    values = {**_preset(preset, presets), **in_file}
    values |= {name: _convert(cls, name, value) for name, value in given.items()}
    return _build(cls, values, "--")


def from_yaml(cls: type[T], path: str | Path) -> T:
    """Settings from a YAML file with every required field.

    Raises:
        SettingsError: the file cannot be read, has an unknown or a missing key, or an invalid value.
    """
    return _build(cls, _read_file(cls, Path(path)), f"{path}: ")


def to_yaml(settings: Any) -> str:
    """All settings as YAML, the inverse of `from_yaml`."""
    import yaml

    text: str = yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True, width=1000)
    return text


def _preset(name: Any, presets: Presets) -> Mapping[str, Any]:
    if name is not None and name not in presets:
        raise SettingsError(f"--preset is {name!r}; allowed are {', '.join(presets)}")
    return {} if name is None else presets[name]


def _read_file(
    cls: type,
    path: Path,
    presets: Presets = _NONE,
    ignored_flags: IgnoredFlags = _NONE,
    translate: Translate | None = None,
) -> dict[str, Any]:
    content = _read_json(path) if path.suffix.lower() == ".json" else read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: contains a {type(content).__name__}; expected 'name: value' lines")
    if translate is not None:
        content = translate(content, f"{path}: ")
    return _by_field(cls, content, str(path), presets, ignored_flags)


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
    presets: Presets = _NONE,
    ignored_flags: IgnoredFlags = _NONE,
) -> dict[str, Any]:
    """Content of a file by field name, checked; `where` is the file or flag, for messages."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    known = {name: field.name for field in fields.values() for name in (field.name, *field.metadata["aliases"])}
    hints = typing.get_type_hints(cls)
    keys: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for key, value in content.items():
        place = f"{_place(content, key, where)}: "
        name = str(key).replace("-", "_")
        if name in ignored_flags:
            values.setdefault(IGNORED, []).append(name)
            continue
        if name not in known and not (presets and name == "preset"):
            raise SettingsError(f"{place}unknown setting {key!r}{did_you_mean(name, known)}")
        name = known.get(name, name)
        if name in keys:
            raise SettingsError(
                f"{place}{key!r} and {keys[name]!r} ({_place(content, keys[name], where)}) are one setting; keep one"
            )
        keys[name] = key
        if name not in fields:
            values[name] = value
            continue
        nested = dataclasses.is_dataclass(field_type(hints[name])[0])
        try:
            # YAML 1.1 reads 5e-6 as text, which is converted to the type of the field
            value = _convert(cls, name, value, where)
            values[name] = check_value(fields[name], hints[name], value)
        except SettingsError as error:
            raise error if nested else SettingsError(f"{place}{error}") from None
    return values


def _place(content: Mapping[Any, Any], key: Any, where: str) -> str:
    line = content.lines.get(key) if isinstance(content, Table) else None
    return where if line is None else f"{where}, line {line}"


def _convert(cls: type, name: str, value: Any, where: str = "") -> Any:
    """Convert text to the type of a field. The dataclass checks the limits later."""
    hint = typing.get_type_hints(cls)[name]
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
    raise SettingsError(f"--{name} is {value[:100]!r}; {noun} is allowed")


def _nested(cls: Any, name: str, value: Any, where: str) -> Any:
    """Nested settings from a mapping or its YAML."""
    content = parse_yaml(value, f"--{name}") if isinstance(value, str) else value
    place = f"--{name}" if isinstance(value, str) or not where else where
    if not isinstance(content, dict):
        raise SettingsError(f"{place}: --{name} contains {content!r}; expected 'name: value' pairs")
    begins = f"{place}: --{name}: " if place != f"--{name}" else f"--{name}: "
    if isinstance(content, Table) and content.lines and place == where:
        begins = f"{where}, line {min(content.lines.values())}: --{name}: "
    return _build(cls, _by_field(cls, content, place), begins)


def _build(cls: type[T], values: dict[str, Any], prefix: str) -> T:
    required: Any = cls
    fields = [field.name for field in dataclasses.fields(required) if field.default is dataclasses.MISSING]
    if missing := [name for name in fields if name not in values]:
        if prefix == "--":
            raise SettingsError(f"missing: {', '.join(f'--{name}' for name in missing)} (--help lists all flags)")
        raise SettingsError(f"{prefix}missing: {', '.join(missing)}")
    return cls(**values)


def _spellings(name: str) -> list[str]:
    return [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return " [required]"
    if field.default is None or field.default is False or field.default == "":
        return ""
    return f" [{'on' if field.default is True else field.default}]".replace("%", "%%")
