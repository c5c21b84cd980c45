"""What the argument parsers of all commands share."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from mflux_vae.errors import SettingsError, did_you_mean
from mflux_vae.utils.formatting import first_few, shortened


def check_spellings(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Refuse a flag that is given under two of its names; of a flag given twice under one name the last one counts.

    ``--x``, its hyphenated form and ``--no_x`` are one name.

    Raises:
        SettingsError: names both.
    """
    first: dict[str, str] = {}
    for word in words:
        flag = word.partition("=")[0]
        action = parser._option_string_actions.get(flag)
        if action is None or not flag.startswith("--"):
            continue
        name = flag[2:].replace("-", "_")
        if name == f"no_{action.dest}":
            continue
        if (other := first.setdefault(action.dest, name)) != name:
            raise SettingsError(f"--{other} and {flag} are one setting; give one of them")


class CommandParser(ArgumentParser):
    """Parser of the program (with `commands`) or of a command. Reports unknown flags before missing ones."""

    commands: Mapping[str, ArgumentParser] | None = None

    def add_commands(self) -> Any:
        """Add a required command; `add_parser` of what is returned adds one."""
        added = self.add_subparsers(title="commands", metavar="COMMAND", required=True)
        self.commands = added.choices
        return added

    def add_functions(self, functions: Sequence[Callable[[ArgumentParser], Any]], dest: str) -> None:
        """Add a command for each function, with its name and the first line of its docstring.

        Args:
            functions: add flags to a parser and return the value of `dest`.
        """
        commands = self.add_commands()
        for add in functions:
            text = (add.__doc__ or "").strip().partition("\n")[0]
            added = commands.add_parser(add.__name__, help=text, description=text, allow_abbrev=False)
            added.set_defaults(**{dest: add(added)})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if self.commands is not None:
            named = next((word for word in words if not word.startswith("-")), None)
            if named is not None and named not in self.commands:
                self.error(f"unknown command {shortened(named, 100)}{did_you_mean(named, self.commands)}")
        else:
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            for flag in flags:
                if flag not in self._option_string_actions:
                    self.error(f"unknown flag {shortened(flag, 100)}{did_you_mean(flag, self._option_string_actions)}")
            check_spellings(self, words)
        values, extra = super().parse_known_args(words, namespace)
        if extra and self.commands is None:
            places = [str(action.metavar or action.dest).upper() for action in self._positionals._group_actions]
            expected = f"expected one {' and one '.join(places)}" if places else "expected flags only"
            self.error(f"unexpected argument {first_few(extra)}: {expected}")
        return values, extra

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (--help lists {'flags' if self.commands is None else 'commands'})")
