"""Prompts of single images: from metadata.jsonl or metadata.csv, a text file beside the image, or the concept's."""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux_vae.errors import InputError, SettingsError, collecting
from mflux_vae.image_folder.scan import METADATA, ImageFolder, match_key
from mflux_vae.utils.formatting import count_text, first_names
from mflux_vae.utils.paths import same_place
from mflux_vae.utils.text_files import parse_json, read_text
from mflux_vae_train.settings.fields import is_valid_text

FILE_NAME = "file_name"
"""Key of the image in a row of the metadata."""

CAPTION_KEYS = ("text", "prompt")
"""Keys that hold the prompt unless ``--caption_column`` names one."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """
    Attributes:
        texts: prompt of each image, by the image's name.
        captioned: names of the images whose prompt is from a file.
        warnings: captions that are missing, empty or not used; one line a kind.
    """

    texts: Mapping[str, str]
    captioned: frozenset[str]
    warnings: tuple[str, ...]


def captions(
    folder: ImageFolder, *, prompt: str, column: str | None = None, errors: list[InputError] | None = None
) -> Captions:
    """The prompt of each image: from the metadata, else from its text file, else `prompt`. Skips empty texts.

    Args:
        column: key of the prompts in the metadata; None for the first of `CAPTION_KEYS` that a row has.
        errors: collects those of text files, which are left out then.

    Raises:
        SettingsError: metadata or a text file cannot be read; the metadata name a missing image, an image twice, or
            lack the column; or a column is given and there are no metadata.
    """
    rows, unused_rows = _read_metadata(folder, column)
    files = {image: name for image, name in folder.captions.items() if not rows.get(image)}
    contents = {}
    for name in dict.fromkeys(files.values()):
        with collecting(errors):
            contents[name] = read_text(folder.folder / name)
    files = {image: name for image, name in files.items() if name in contents}
    texts = dict(rows)
    for image, name in files.items():
        texts[image] = " ".join(contents[name].split())
    captioned = frozenset(image for image in folder.images if texts.get(image))
    lines = _warnings(
        empty=[files.get(image, image) for image in folder.images if image in texts and not texts[image]],
        missing=[image for image in folder.images if captioned and image not in texts],
        replaced=[folder.captions[image] for image in folder.images if rows.get(image) and image in folder.captions],
        long=[name for name, text in contents.items() if sum(map(bool, map(str.strip, text.split("\n")))) > 1],
        unused_rows=unused_rows,
        images=len(folder.images),
        metadata=folder.metadata,
    )
    return Captions(
        texts={image: texts.get(image) or prompt for image in folder.images},
        captioned=captioned,
        warnings=tuple(f"{folder.folder}: {line}" for line in lines),
    )


def _warnings(
    *,
    empty: list[str],
    missing: list[str],
    replaced: list[str],
    long: list[str],
    unused_rows: list[str],
    images: int,
    metadata: str | None,
) -> Iterator[str]:
    if empty := list(dict.fromkeys(empty)):
        yield f"{count_text(len(empty), 'empty caption')} ({first_names(empty)}): --instance_prompt is used instead"
    if missing:
        yield f"{len(missing)} of {images} images have no caption ({first_names(missing)}): --instance_prompt is used"
    if replaced := list(dict.fromkeys(replaced)):
        count = count_text(len(replaced), "caption file")
        yield f"{count} not used ({first_names(replaced)}): {metadata} has captions of these images"
    if long:
        yield f"{count_text(len(long), 'caption')} of several lines, which are joined to one ({first_names(long)})"
    if unused_rows:
        count = count_text(len(unused_rows), "row")
        yield f"{count} of {metadata} for files that are not used ({first_names(unused_rows)})"


def _read_metadata(folder: ImageFolder, column: str | None) -> tuple[dict[str, str], list[str]]:
    """Prompts by image, and file names of rows for files that are not used."""
    if folder.metadata is None:
        if column is not None:
            raise SettingsError(f"--caption_column {column}: {folder.folder / METADATA[0]} does not exist")
        return {}, []
    path = folder.folder / folder.metadata
    unused = {match_key(name) for names in folder.unused.values() for name in names} | {
        match_key(name) for name in folder.masks.values()
    }
    prompts: dict[str, str] = {}
    lines: dict[str, int] = {}
    skipped = []
    for number, row in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path):
        where = f"{path}, line {number}"
        if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str):
            raise SettingsError(f"{where}: expected a JSON object with a {FILE_NAME}")
        image = _find_image(folder, row[FILE_NAME], where, unused)
        if image is None:
            skipped.append(row[FILE_NAME])
            continue
        if image in lines:
            raise SettingsError(f"{path}: lines {lines[image]} and {number} are both for {image!r}; keep one")
        lines[image] = number
        prompts[image] = _prompt(row, column, where)
    return prompts, skipped


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and value of each line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except (ValueError, RecursionError) as error:
                raise SettingsError(f"{path}, line {number}: not valid JSON ({error})") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and values of each row, by the names in the first one."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    names: list[str] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not names:
                names = [name.strip() for name in row]
                if FILE_NAME not in names or len({*names}) < len(names):
                    raise SettingsError(f"{path}: the first line must name each column once, as in {FILE_NAME},text")
                continue
            if len(row) != len(names):
                found = f"{len(row)} values for {len(names)} columns"
                raise SettingsError(f"{path}, line {reader.line_num}: {found}; put texts with commas in quotes")
            yield reader.line_num, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise SettingsError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error


def _find_image(folder: ImageFolder, name: str, where: str, unused: set[str]) -> str | None:
    """The image that a row is for; None if the file is there and not used.

    Raises:
        SettingsError: no such file, or several images whose names differ in case or normalization.
    """
    plain = posixpath.normpath(name if name in folder.images else name.replace("\\", "/"))
    if posixpath.isabs(plain) and same_place(posixpath.dirname(plain), folder.folder):
        plain = posixpath.basename(plain)
    found = folder.find(plain)
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingsError(f"{where}: {name!r} may be {' or '.join(found)}; write the name of the file")
    if match_key(plain) in unused or match_key(plain.split("/")[0]) in unused:
        return None
    below = posixpath.basename(plain)
    hint = f"; write {below!r} for the image in this folder" if folder.find(below) else ""
    raise SettingsError(f"{where}: image {name!r} does not exist in {folder.folder}{hint}")


def _prompt(row: Mapping[str, object], column: str | None, where: str) -> str:
    keys = CAPTION_KEYS if column is None else (column,)
    value = next((row[name] for name in keys if name in row), None)
    if not isinstance(value, str):
        raise SettingsError(f"{where}: no text under {' or '.join(keys)}; set the key with --caption_column")
    if not is_valid_text(value):
        raise SettingsError(f"{where}: the prompt has characters that cannot be encoded as UTF-8")
    return value.strip()
