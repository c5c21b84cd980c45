"""Read YAML files safely, and only values that all versions of YAML read alike. Write YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mflux_vae.errors import SettingsError
from mflux_vae.utils.links import missing
from mflux_vae.utils.text_files import Table, read_text

MAX_VALUES = 100_000
"""Values in a file, aliases expanded: a few lines of aliases can stand for billions."""


def read_yaml(path: str | Path) -> Any:
    """Read plain values; mappings are tables with the lines of their keys.

    Raises:
        SettingsError: the file does not exist or cannot be read, or see `parse_yaml`.
    """
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise SettingsError(f"{path} {missing(path, 'does not exist; give a YAML file')}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Read plain values from YAML.

    ``yes``, ``no``, ``on`` and ``off`` are text, as in YAML 1.2. Numbers such as 010, 1:30 and 1_000, which versions of
    YAML read differently, and dates are refused.

    Args:
        where: file or flag, for messages.

    Raises:
        SettingsError: not valid YAML, a key twice, an ambiguous value, a tag, too many values, or a reference to
            itself. The message names line and key.
    """
    try:
        import yaml
    except ImportError as error:
        raise SettingsError(f"{where}: reading YAML needs pyyaml; pip install pyyaml") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Builder(where).value(node)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a huge number
        raise SettingsError(f"{where}: not valid YAML: {' '.join(str(error).split())[:300]}") from error


def dump_yaml(content: Mapping[str, Any]) -> str:
    """YAML of plain values, in order; `parse_yaml` reads the same values from it."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def represent(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        breaks = any(character in text for character in "\x85\u2028\u2029")  # PyYAML writes them as line breaks
        style = '"' if breaks or _AMBIGUOUS.fullmatch(text) else None
        return dumper.represent_scalar(f"{_PREFIX}str", text, style=style)

    Dumper.add_representer(str, represent)
    text: str = yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return text


_PREFIX = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
_AMBIGUOUS = re.compile(r"[-+]?(0[0-9]+|0[ob][0-9_]+|(?=.*_)\.?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9_]+)?)")
"""Text in YAML 1.1 that looks like a number."""


class _Builder:
    """Builds values from nodes. Aliases are expanded."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._count = 0
        self._open: list[Any] = []

    def value(self, node: Any, key: str = "") -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise SettingsError(
                f"{self._where}: holds more than {MAX_VALUES} values with aliases expanded; write fewer"
            )
        kind = node.tag.removeprefix(_PREFIX)
        if isinstance(node.value, str):
            return self._scalar(node, kind, key)
        if kind not in ("map", "seq"):
            self._refuse(node, key, f"the tag {node.tag} is not allowed; remove it")
        if any(node is each for each in self._open):
            self._refuse(node, key, "refers to itself; remove the alias")
        self._open.append(node)
        if kind == "seq":
            built: Any = [self.value(one, key) for one in node.value]
        else:
            built = self._table(node)
        self._open.pop()
        return built

    def _table(self, node: Any) -> Table:
        table, merged = Table(), Table()
        for key_node, value_node in node.value:
            if key_node.tag == f"{_PREFIX}merge":
                sources = self.value(value_node, "<<")
                for source in reversed(sources if isinstance(sources, list) else [sources]):
                    if not isinstance(source, dict):
                        self._refuse(value_node, "<<", "needs a mapping")
                    merged.update(source)
                continue
            key = self.value(key_node)
            line = key_node.start_mark.line + 1
            if isinstance(key, list | dict):
                self._refuse(key_node, "", "a key is a list or a mapping; write text")
            if key in table:
                self._refuse(key_node, str(key), f"stands in line {table.lines[key]}, too; keep one")
            table[key], table.lines[key] = self.value(value_node, str(key)), line
        return Table({**merged, **table}, lines=table.lines)

    def _scalar(self, node: Any, kind: str, key: str) -> Any:
        text: str = node.value
        if kind == "null":
            return None
        if kind == "bool":
            known = {"true": True, "false": False}
            return known.get(text.lower(), text)
        if kind == "timestamp":
            self._refuse(node, key, f"{text} is a date in YAML; put it in quotes")
        if kind == "int" and _WHOLE.fullmatch(text):
            return int(text, 16 if "x" in text else 10)
        if kind == "float" and _DECIMAL.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        plain = kind in ("str", "value", "merge")
        if kind in ("int", "float") or (plain and node.style is None and _AMBIGUOUS.fullmatch(text)):
            self._refuse(
                node,
                key,
                f"versions of YAML read {text} differently; write a plain decimal number, or put it in quotes",
            )
        if not plain:
            self._refuse(node, key, f"the tag {node.tag} is not allowed; remove it")
        return text

    def _refuse(self, node: Any, key: str, why: str) -> NoReturn:
        name = f"{key[:100]}: " if key else ""
        raise SettingsError(f"{self._where}, line {node.start_mark.line + 1}: {name}{why[:300]}")
