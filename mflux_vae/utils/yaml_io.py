"""Read YAML files safely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.text_files import read_text

MAX_VALUES = 100_000
"""Values in a file, aliases expanded: a few lines of aliases can stand for billions."""


def read_yaml(path: str | Path) -> Any:
    """Read plain values; tags that construct objects are refused.

    Raises:
        SettingsError: the file cannot be read, is not valid YAML, refers to itself, or holds too many values.
    """
    try:
        import yaml
    except ImportError as error:
        raise SettingsError(f"{path}: reading YAML needs pyyaml; pip install pyyaml") from error
    try:
        content = yaml.safe_load(read_text(path))
        count = _count(content, {})
    except FileNotFoundError as error:
        raise SettingsError(f"{path} does not exist; give a YAML file") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: an impossible date, a huge number
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())[:500]}") from error
    if count > MAX_VALUES:
        raise SettingsError(f"{path}: holds more than {MAX_VALUES} values with aliases expanded; write fewer")
    return content


def _count(value: Any, known: dict[int, int]) -> int:
    """Count the values of a tree; `known` caches counts by identity."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = MAX_VALUES + 1  # a branch that contains itself
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(value)]
