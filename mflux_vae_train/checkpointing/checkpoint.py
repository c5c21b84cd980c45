"""Checkpoints: folders ``checkpoint-N`` with named objects, written atomically and restored strictly.

N counts optimizer updates. A folder holds ``state.safetensors`` (arrays) and ``state.json`` (plain values,
the run's fingerprint, and a checksum of both files). What the objects mean is not known here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.weights.formats.files import read_safetensors
from mflux_vae_train.checkpointing.state import Stateful, flatten, restore
from mflux_vae_train.fingerprint import file_hash

logger = logging.getLogger(__name__)

ARRAYS, VALUES = "state.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_REPLACED = re.compile(r"\.checkpoint-(\d+)\.replaced")


def save(
    output_dir: str | Path,
    step: int,
    objects: Mapping[str, Stateful],
    *,
    fingerprint: Mapping[str, Any] | None = None,
    total_limit: int | None = None,
) -> Path:
    """Write ``output_dir/checkpoint-{step}``; then delete the oldest beyond `total_limit`.

    The final name appears only after everything has reached the disk, and goes before anything of it is deleted. A
    checkpoint of the same step is replaced.

    Args:
        step: optimizer updates made.
        fingerprint: plain JSON that must be the same on resume (data, settings that shape the training).

    Returns:
        the folder.

    Raises:
        TrainingError: it cannot be written; the checkpoints of before are as they were.
    """
    output_dir = Path(output_dir)
    arrays, values = flatten(objects)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.writing"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        clean_up(output_dir)
        try:
            temporary.mkdir()
            mx.save_safetensors(str(temporary / ARRAYS), arrays)
            content = {"step": step, "fingerprint": dict(fingerprint or {}), "values": values}
            checksums = {ARRAYS: file_hash(temporary / ARRAYS), VALUES: _digest(content)}
            text = json.dumps({**content, "sha256": checksums}, indent=1, sort_keys=True)
            (temporary / VALUES).write_text(text, encoding="utf-8")
            for path in (temporary / ARRAYS, temporary / VALUES, temporary):
                _sync(path)
            if final.exists():
                final.rename(output_dir / f".{final.name}.replaced")
            temporary.rename(final)
            _sync(output_dir)
        finally:
            clean_up(output_dir)
    except (OSError, RuntimeError) as error:  # RuntimeError: what MLX says of a full disk
        raise TrainingError(
            f"{final}: cannot be written ({error}); earlier checkpoints are untouched: make room and repeat the command"
        ) from error
    if total_limit is not None:
        others = [folder for _, folder in _found(output_dir) if folder != final]
        for old in others[total_limit - 1 :]:
            with suppress(OSError):  # to be tried again after the next one
                old.rename(output_dir / f".{old.name}.removed")
        clean_up(output_dir)
    return final


def latest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is complete and whose checksums hold; None where there is none.

    Broken ones are skipped with a warning in the log that names them.
    """
    for _, folder in _found(Path(output_dir)):
        try:
            read(folder)
        except TrainingError as error:
            logger.warning("skipped: %s", error)
        else:
            return folder
    return None


def read(folder: str | Path) -> dict[str, Any]:
    """Verify a checkpoint and return its plain part: `step`, `fingerprint`, `values`.

    Raises:
        TrainingError: incomplete, truncated or changed since it was written.
    """
    folder = Path(folder)
    try:
        content: dict[str, Any] = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        checksums = content.pop("sha256")
        whole = checksums == {ARRAYS: file_hash(folder / ARRAYS), VALUES: _digest(content)}
        int(content["step"]), dict(content["fingerprint"]), dict(content["values"])
    except FileNotFoundError as error:
        raise TrainingError(f"{folder}: no complete checkpoint: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise TrainingError(f"{folder}: broken checkpoint: {VALUES} cannot be read ({error})") from error
    if not whole:
        raise TrainingError(f"{folder}: broken checkpoint: its checksum does not hold; resume from another one")
    return content


def load(
    folder: str | Path,
    objects: Mapping[str, Stateful],
    *,
    fingerprint: Mapping[str, Any] | None = None,
    allow_changes: bool = False,
) -> int:
    """Restore all objects from a checkpoint, or none.

    Args:
        allow_changes: another fingerprint is a warning, no error.

    Returns:
        optimizer updates made when it was written.

    Raises:
        TrainingError: the checkpoint is broken, or does not have exactly these objects' entries.
        SettingsError: the run's fingerprint differs; the message names what.
    """
    content = read(folder)
    if changed := differences(content["fingerprint"], fingerprint or {}):
        if not allow_changes:
            raise SettingsError(
                f"{folder}: belongs to another run: {'; '.join(changed)}; use the same, or a new --output_dir"
                " (--allow_changes continues all the same)"
            )
        logger.warning("%s: continued with changes: %s", folder, "; ".join(changed))
    arrays, _ = read_safetensors(Path(folder) / ARRAYS)
    restore(objects, arrays, content["values"], where=str(folder))  # which drops the old arrays
    mx.eval(arrays)  # reading is lazy, and the file may be pruned before the arrays are used
    return int(content["step"])


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, one text each."""
    now = json.loads(json.dumps(dict(now)))  # tuples are lists in a file
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r}, is now {now.get(name)!r}" for name in names]


def clean_up(output_dir: Path) -> None:
    """End what was begun: checkpoints half written or half deleted go, one whose successor never came is back."""
    for leftover in output_dir.glob(".checkpoint-*"):
        replaced = _REPLACED.fullmatch(leftover.name)
        if replaced and not (output_dir / f"checkpoint-{replaced[1]}").exists():
            leftover.rename(output_dir / f"checkpoint-{replaced[1]}")
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _found(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first; one that waits for its successor under another name, too."""
    folders = {folder.name: folder for folder in output_dir.iterdir()} if output_dir.is_dir() else {}
    found = []
    for name, folder in folders.items():
        replaced = _REPLACED.fullmatch(name)
        if replaced and f"checkpoint-{replaced[1]}" in folders:
            continue
        if (match := replaced or _NAME.fullmatch(name)) and folder.is_dir():
            found.append((int(match[1]), folder))
    return sorted(found, reverse=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Have a file or a folder's entries reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
