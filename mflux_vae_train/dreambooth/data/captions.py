"""Prompts of single images: from ``metadata.jsonl``, from a text file beside the image, or the concept's prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mflux_vae.errors import SettingsError
from mflux_vae.utils.text_files import parse_json, read_text
from mflux_vae_train.settings.fields import is_valid_text

METADATA = "metadata.jsonl"
"""One JSON object per line: the file name of an image under ``file_name``, and its prompt."""

CAPTION_KEYS = ("text", "prompt")
"""Keys that hold the prompt unless ``--caption_column`` names one."""


def captions(folder: Path, images: Sequence[Path], *, prompt: str, column: str | None = None) -> list[str]:
    """The prompt of each image: from metadata.jsonl, else from its .txt file, else `prompt`. Skips empty texts.

    Args:
        column: key of the prompts in metadata.jsonl; None for the first of `CAPTION_KEYS` that a row has.

    Raises:
        SettingsError: metadata.jsonl or a text file cannot be read, names a missing image, or lacks the column; or
            a column is given and metadata.jsonl is missing.
    """
    rows = _read_metadata(folder, {path.name for path in images}, column)
    return [rows.get(path.name) or _read_text_file(path) or prompt for path in images]


def _read_metadata(folder: Path, names: set[str], column: str | None) -> dict[str, str]:
    path = folder / METADATA
    if not path.is_file():
        if column is not None:
            raise SettingsError(f"--caption_column {column}: {path} does not exist")
        return {}
    prompts = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise SettingsError(f"{where}: expected a JSON object with a file_name")
        if row["file_name"] not in names:
            raise SettingsError(f"{where}: image {row['file_name']!r} does not exist in {folder}")
        prompts[row["file_name"]] = _prompt(row, column, where)
    return prompts


def _prompt(row: dict[str, object], column: str | None, where: str) -> str:
    keys = CAPTION_KEYS if column is None else (column,)
    value = next((row[name] for name in keys if name in row), None)
    if not isinstance(value, str):
        raise SettingsError(f"{where}: no text under {' or '.join(keys)}; set the key with --caption_column")
    if not is_valid_text(value):
        raise SettingsError(f"{where}: the prompt has characters that cannot be encoded as UTF-8")
    return value.strip()


def _read_text_file(image: Path) -> str:
    path = image.with_suffix(".txt")
    return " ".join(read_text(path).split()) if path.is_file() else ""
