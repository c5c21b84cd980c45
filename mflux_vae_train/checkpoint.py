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
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae_train.state import Stateful, flatten, restore

logger = logging.getLogger(__name__)

ARRAYS, VALUES = "state.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def save(
    output_dir: str | Path,
    step: int,
    objects: Mapping[str, Stateful],
    *,
    fingerprint: Mapping[str, Any] | None = None,
    total_limit: int | None = None,
) -> Path:
    """Write ``output_dir/checkpoint-{step}``; then delete the oldest beyond `total_limit`.

    The final name appears only after everything has reached the disk. A checkpoint of the same step is replaced.

    Args:
        step: optimizer updates made.
        fingerprint: plain JSON that must be the same on resume (data, settings that shape the training).

    Returns:
        the folder.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    arrays, values = flatten(objects)
    final = output_dir / f"checkpoint-{step}"
    temporary = output_dir / f".checkpoint-{step}.writing"
    for leftover in output_dir.glob(".checkpoint-*"):  # of a process that was killed while writing
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        mx.save_safetensors(str(temporary / ARRAYS), arrays)
        content = {"step": step, "fingerprint": dict(fingerprint or {}), "values": values}
        checksums = {ARRAYS: _checksum(temporary / ARRAYS), VALUES: _digest(content)}
        text = json.dumps({**content, "sha256": checksums}, indent=1, sort_keys=True)
        (temporary / VALUES).write_text(text, encoding="utf-8")
        for path in (temporary / ARRAYS, temporary / VALUES, temporary):
            _sync(path)
        if final.exists():
            final.rename(output_dir / f".checkpoint-{step}.replaced")
        temporary.rename(final)
        _sync(output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(output_dir / f".checkpoint-{step}.replaced", ignore_errors=True)
    if total_limit is not None:
        others = [folder for _, folder in _found(output_dir) if folder != final]
        for old in others[total_limit - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
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
        whole = checksums == {ARRAYS: _checksum(folder / ARRAYS), VALUES: _digest(content)}
    except FileNotFoundError as error:
        raise TrainingError(f"{folder}: no complete checkpoint: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TrainingError(f"{folder}: broken checkpoint: {VALUES} cannot be read ({error})") from error
    if not whole:
        raise TrainingError(f"{folder}: broken checkpoint: its checksum does not hold; resume from another one")
    return content


def load(folder: str | Path, objects: Mapping[str, Stateful], *, fingerprint: Mapping[str, Any] | None = None) -> int:
    """Restore all objects from a checkpoint, or none.

    Returns:
        optimizer updates made when it was written.

    Raises:
        TrainingError: the checkpoint is broken, or does not have exactly these objects' entries.
        SettingsError: the run's fingerprint differs; the message names what.
    """
    content = read(folder)
    before, now = content["fingerprint"], json.loads(json.dumps(dict(fingerprint or {})))
    changed = [
        f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise SettingsError(
            f"{folder}: belongs to another run: {'; '.join(changed)}; use the same, or a new --output_dir"
        )
    arrays = cast("dict[str, mx.array]", mx.load(str(Path(folder) / ARRAYS)))
    mx.eval(arrays)  # reading is lazy, and the file may be pruned before the arrays are used
    restore(objects, arrays, content["values"], where=str(folder))
    return int(content["step"])


def _found(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, newest first."""
    folders = output_dir.iterdir() if output_dir.is_dir() else []
    found = [(int(m[1]), f) for f in folders if (m := _NAME.fullmatch(f.name)) and f.is_dir()]
    return sorted(found, reverse=True)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Have a file or a folder's entries reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
