"""A settings dataclass as a command line and as YAML. The dataclass is the only definition of a setting.

Flags are spelled like fields, ``--train_batch_size``, or with hyphens. A flag on the command line overrides
``--config run.yaml``, which overrides ``--preset name``, which overrides the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mflux_vae.errors import SettingsError, did_you_mean
from mflux_vae.utils.command_line import check_spellings
from mflux_vae.utils.formatting import first_few, shortened
from mflux_vae.utils.paths import expand
from mflux_vae.utils.yaml_io import dump_yaml
from mflux_vae_train.settings.fields import field_type, hints_of, is_tuple
from mflux_vae_train.settings.origins import origins_of, places_of, set_origins, settle_spellings
from mflux_vae_train.settings.values import (
    DERIVED,
    IGNORED,
    NONE,
    IgnoredFlags,
    Presets,
    Refused,
    Translate,
    Values,
    build,
    convert,
    read_file,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

SHORT_USAGE = "%(prog)s [--flag value ...]"
"""Short, as a list of all flags would fill the screen."""

METAVARS = {str: "TEXT", int: "N", float: "X", bool: None}
"""Nested settings are given as YAML."""

_DERIVED_COMMENT = """\
# Defaults, and values derived from the settings above, the pipeline and the images. --config derives them again:
# to change one, write it above or give its flag."""


class _AppendIgnored(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, word: str | None = None) -> None:
        given = (self.dest, " ".join(values), f"--{self.dest}")
        setattr(namespace, IGNORED, [*getattr(namespace, IGNORED, ()), given])


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        check_spellings(self, words)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (--help lists flags)")


def parser_from(
    cls: type,
    *,
    prog: str | None = None,
    description: str | None = None,
    ignored_flags: IgnoredFlags = NONE,
) -> argparse.ArgumentParser:
    """An argument parser with ``--config`` and one flag per field of `cls`; ``--help`` ends with `ignored_flags`.

    Flags that are not given are absent from the namespace. A boolean field ``x`` gives ``--x``, optionally followed by
    true or false, and ``--no_x``. Numbers that may be None accept ``none`` and ``auto``.

    Raises (when parsing):
        SettingsError: an unknown flag or an invalid value; nothing is printed.
    """
    parts = []
    for refused, what in ((False, "Accepted and ignored, with a log line"), (True, "Refused, with an error")):
        if names := [f"--{name}" for name, why in ignored_flags.items() if isinstance(why, Refused) == refused]:
            parts.append(f"{what} that says why: {', '.join(names)}.")
    epilog = " ".join(parts) or None
    parser = _Parser(prog=prog, usage=SHORT_USAGE, description=description, epilog=epilog, allow_abbrev=False)
    add_flags(parser, cls)
    for name in ignored_flags:
        spellings, hidden = _spellings(name), argparse.SUPPRESS
        parser.add_argument(*spellings, action=_AppendIgnored, nargs="*", default=hidden, help=hidden)
    return parser


def add_flags(
    parser: argparse.ArgumentParser, cls: type, presets: Presets = NONE, only: Collection[str] | None = None
) -> None:
    """Add the flags of `parser_from` to a parser, and ``--preset`` if there are presets.

    Args:
        only: names of the settings that are flags, none of them required; others can be in the file. None for all.
    """
    add = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--config", metavar="FILE", action="append", help="YAML or JSON file of settings; flags override it")
    if presets:
        add("--preset", metavar="{" + ",".join(presets) + "}", help="a set of defaults; --config and flags override it")
    if only is None and (main := getattr(cls, "MAIN", ())):
        _shorten_help(parser, main, count=len(dataclasses.fields(cls)))
    hints = hints_of(cls)
    for field in dataclasses.fields(cls):
        if heading := field.metadata.get("group"):
            add = functools.partial(parser.add_argument_group(heading).add_argument, default=argparse.SUPPRESS)
        if only is not None and field.name not in only:
            continue
        kind, _ = field_type(hints[field.name])
        text = field.metadata["help"].replace("%", "%%") + _default_text(field)
        text = text if only is None else text.replace(" [required]", "")
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


def _shorten_help(parser: argparse.ArgumentParser, main: Sequence[str], count: int) -> None:
    """Let ``--help`` show the flags of `main` only, and ``--help-all`` all."""

    class ShortHelp(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
            formatter = parser._get_formatter()
            formatter.add_usage(parser.usage, [], [])
            formatter.add_text(parser.description)
            for group in parser._action_groups:
                general = group is parser._optionals
                formatter.start_section(group.title)
                named = [each for each in group._group_actions if each.dest in main and each.const is not False]
                formatter.add_arguments(group._group_actions if general else named)
                formatter.end_section()
            formatter.add_text(f"These are the main flags of {count}; --help-all lists all.")
            print(formatter.format_help(), end="")
            parser.exit()

    general, hidden = parser._optionals, argparse.SUPPRESS
    general.conflict_handler = "resolve"  # replaces the --help that argparse added
    general.add_argument("-h", "--help", action=ShortHelp, nargs=0, dest=hidden, default=hidden, help="show main flags")
    general.conflict_handler = "error"
    parser.add_argument("--help-all", "--help_all", action="help", help="show all flags")


def settings_from(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    ignored_flags: IgnoredFlags = NONE,
    translate: Translate | None = None,
    **parser_options: Any,
) -> T:
    """Settings from a command line (None: ``sys.argv``), which overrides ``--config``.

    Logs a warning for each of `ignored_flags` on the command line or in the file, unless it is refused. `translate`
    reads files of other programs.

    Raises:
        SettingsError: an unknown flag or key (with the closest known one), a missing required flag, or a value that the
            dataclass refuses.
    """
    parser = parser_from(cls, ignored_flags=ignored_flags, **parser_options)
    namespace, unknown = parser.parse_known_args(argv)
    known = {word.lstrip("-").replace("-", "_") for word in parser._option_string_actions}
    for word in unknown:
        if word.startswith("-"):
            flag = word.split("=")[0]
            hint = did_you_mean(flag.lstrip("-").replace("-", "_"), known, "--")
            raise SettingsError(f"unknown flag {shortened(flag, 100)}{hint} (--help lists flags)")
        raise SettingsError(f"{shortened(repr(word), 100)} follows no flag; quote a value that contains spaces")
    return settings_of(cls, vars(namespace), ignored_flags=ignored_flags, translate=translate)


def settings_of(
    cls: type[T],
    given: Mapping[str, Any],
    presets: Presets = NONE,
    ignored_flags: IgnoredFlags = NONE,
    translate: Translate | None = None,
) -> T:
    """Settings from the namespace of a parser with `add_flags`; `translate` reads files of other programs.

    Raises:
        SettingsError: as `settings_from`, or an unknown preset.
    """
    given = dict(given)
    configs, preset, ignored = given.pop("config", []), given.pop("preset", None), given.pop(IGNORED, [])
    configs = [configs] if isinstance(configs, str) else configs
    if len(configs) > 1:
        raise SettingsError(f"--config is given {len(configs)} times ({first_few(configs)}); give one file")
    file = read_file(cls, Path(expand(configs[0])), presets, ignored_flags, translate) if configs else Values()
    unused = []
    for name, value, place in [*file.pop(IGNORED, []), *ignored]:
        why = ignored_flags[name]
        if isinstance(why, Refused):
            why.check(value, f"{place}: ")
        else:
            unused.append(f"--{name} has no effect: {why}")
    file.pop(DERIVED, None)
    preset_in_file = file.pop("preset", None)
    if preset is None:
        preset = preset_in_file
    elif kept := [name for name in file if name in _preset(preset, presets)]:
        unused.append(f"--preset {preset} does not set {first_few(kept)}: {configs[0]} does")
    flags = {name: convert(cls, name, value) for name, value in given.items()}
    unused += settle_spellings(cls, flags, file)
    for line in unused:
        logger.warning("%s", line)
    try:
        settings = build(cls, {**_preset(preset, presets), **file, **flags}, "--")
    except SettingsError as error:
        raise type(error)(f"{error}{places_of(str(error), flags, file)}") from None
    set_origins(settings, flags, file, unused)
    return settings


def from_yaml(cls: type[T], path: str | Path) -> T:
    """Settings from a YAML file with every required field, derived ones included.

    Raises:
        SettingsError: the file cannot be read, has an unknown or a missing key, or an invalid value.
    """
    values = read_file(cls, Path(path))
    derived = values.pop(DERIVED, {})
    return build(cls, {**values, **derived}, f"{path}: ")


def to_yaml(settings: Any, given: Any = None, omit: Collection[str] = ()) -> str:
    """All settings as YAML, the inverse of `from_yaml`.

    Args:
        given: the settings that `settings` were derived from. Then those that differ from their defaults come first,
            and all others are under `DERIVED`, which ``--config`` does not read.
        omit: names of settings that are written with their defaults.
    """
    resolved = dataclasses.asdict(settings) | {
        f.name: f.default for f in dataclasses.fields(settings) if f.name in omit
    }
    if given is None:
        return dump_yaml(resolved)
    values, origins = dataclasses.asdict(given), origins_of(given)
    stated = {f.name for f in dataclasses.fields(given) if values[f.name] != f.default or f.name in origins}
    computed = {name for name, other in getattr(given, "COMPUTED", {}).items() if values[other] is not None}
    names = [name for name in values if name in stated - computed - {*omit}]
    derived = {name: value for name, value in resolved.items() if name not in names or value != values[name]}
    return f"{dump_yaml({name: values[name] for name in names})}\n{_DERIVED_COMMENT}\n{dump_yaml({DERIVED: derived})}"


def _preset(name: Any, presets: Presets) -> Mapping[str, Any]:
    if name is not None and name not in presets:
        hint = did_you_mean(str(name), presets) or ";"
        raise SettingsError(f"--preset is {shortened(repr(name), 100)}{hint} allowed are {', '.join(presets)}")
    return {} if name is None else presets[name]


def _spellings(name: str) -> list[str]:
    return [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return " [required]"
    if field.default is None or field.default is False or field.default == "":
        return ""
    return f" [{'on' if field.default is True else field.default}]".replace("%", "%%")
