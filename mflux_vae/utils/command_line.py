"""What the argument parsers of all commands share."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from mflux_vae.errors import SettingsError


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
