"""YAML files from anywhere: plain values come out, or one error that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError

MOST_VALUES = 100_000
"""In a file, counted as often as its aliases repeat them: a few lines of aliases can stand for billions."""


def read_yaml(path: str | Path) -> Any:
    """Plain values; nothing that a file names is looked up or made.

    Raises:
        SettingsError: it cannot be read, is no YAML, refers to itself, or holds too many values.
    """
    try:
        import yaml
    except ImportError as error:
        raise SettingsError(f"{path}: to read it, pip install pyyaml") from error
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        count = _count(content, {})
    except FileNotFoundError as error:
        raise SettingsError(f"{path} does not exist: give a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a thirteenth month, a number of miles
        raise SettingsError(f"{path}: is no YAML: {' '.join(str(error).split())[:500]}") from error
    if count > MOST_VALUES:
        raise SettingsError(f"{path}: holds more than {MOST_VALUES} values, aliases counted; write fewer")
    return content


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in a tree; `known` has those of the branches that were counted, by identity."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # as seen from inside, where it contains itself
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(value)]
