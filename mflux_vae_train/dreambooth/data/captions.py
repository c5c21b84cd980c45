"""Prompts of single pictures: from ``metadata.jsonl``, from a text file beside the picture, or the concept's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mflux_vae.errors import SettingsError
from mflux_vae_train.settings.fields import is_valid_text

METADATA = "metadata.jsonl"
"""One JSON object per line: the picture's name under ``file_name``, and its prompt."""

COLUMNS = ("text", "prompt")
"""Where its prompt is looked for, if ``--caption_column`` does not say."""


def captions(folder: Path, pictures: Sequence[Path], *, prompt: str, column: str | None = None) -> list[str]:
    """The prompt of each picture: its row of metadata.jsonl, else its .txt file, else `prompt`; an empty one counts
    as none.

    Args:
        column: key of the prompts in metadata.jsonl; None for the first of `COLUMNS` that a row has.

    Raises:
        SettingsError: metadata.jsonl or a text file cannot be read, names no picture of the folder, or lacks the
            column; or a column is given and there is no metadata.jsonl.
    """
    said = _metadata(folder, {path.name for path in pictures}, column)
    return [said.get(path.name) or _text_beside(path) or prompt for path in pictures]


def _metadata(folder: Path, names: set[str], column: str | None) -> dict[str, str]:
    path = folder / METADATA
    if not path.is_file():
        if column is not None:
            raise SettingsError(f"--caption_column {column}: there is no {path}")
        return {}
    found = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{where}: is no JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise SettingsError(f"{where}: a JSON object with a file_name is expected")
        if row["file_name"] not in names:
            raise SettingsError(f"{where}: there is no picture {row['file_name']!r} in {folder}")
        found[row["file_name"]] = _prompt(row, column, where)
    return found


def _prompt(row: dict[str, object], column: str | None, where: str) -> str:
    columns = COLUMNS if column is None else (column,)
    value = next((row[name] for name in columns if name in row), None)
    if not isinstance(value, str):
        raise SettingsError(f"{where}: no text under {' or '.join(columns)}; --caption_column names the key")
    if not is_valid_text(value):
        raise SettingsError(f"{where}: the prompt has characters that are no text")
    return value.strip()


def _text_beside(picture: Path) -> str:
    path = picture.with_suffix(".txt")
    return " ".join(_read(path).split()) if path.is_file() else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}): UTF-8 text is expected") from error
