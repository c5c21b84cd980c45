"""Checkpoints: folders ``checkpoint-N`` with named objects, written atomically and restored strictly.

N counts optimizer updates. A folder holds ``state.safetensors`` (arrays) and ``state.json`` (plain values, the run's
fingerprint, and checksums of both files). It may hold more files, for other programs; a run never reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.weights.formats.files import header, read_safetensors, save_arrays
from mflux_vae_train.checkpointing.differences import differences, listed
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
    write_more: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write or replace ``output_dir/checkpoint-{step}``, then delete the oldest checkpoints beyond `total_limit`.

    The folder gets its name after all of it has reached the disk, and loses it before any of it is deleted.

    Args:
        step: number of optimizer updates made.
        fingerprint: plain JSON that must be equal on resume (data, settings that shape the training).
        write_more: writes the files for other programs into a folder; called before the folder gets its name.

    Returns:
        the folder.

    Raises:
        TrainingError: it cannot be written; earlier checkpoints are unchanged.
    """
    output_dir = Path(output_dir)
    arrays, values = flatten(objects)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.writing"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        clean_up(output_dir)
        try:
            temporary.mkdir()
            save_arrays(temporary / ARRAYS, arrays)
            content = {"step": step, "fingerprint": dict(fingerprint or {}), "values": values}
            checksums = {ARRAYS: file_hash(temporary / ARRAYS), VALUES: _digest(content)}
            text = json.dumps({**content, "sha256": checksums}, indent=1, sort_keys=True)
            (temporary / VALUES).write_text(text, encoding="utf-8")
            write_more(temporary)
            for path in (*temporary.iterdir(), temporary):
                _sync(path)
            if final.exists():
                final.rename(output_dir / f".{final.name}.replaced")
            temporary.rename(final)
            _sync(output_dir)
        finally:
            clean_up(output_dir)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError on a full disk
        raise TrainingError(
            f"{final}: cannot be written ({error}); free disk space and run the command again"
        ) from error
    if total_limit is not None:
        others = [folder for _, folder in numbered(output_dir) if folder != final]
        for old in others[total_limit - 1 :]:
            _announce_limit(output_dir, total_limit)
            with suppress(OSError):  # tried again after the next checkpoint
                old.rename(output_dir / f".{old.name}.removed")
        clean_up(output_dir)
    return final


@cache
def _announce_limit(output_dir: Path, total_limit: int) -> None:
    """Log the limit once for each folder."""
    logger.info("%s: the newest %d checkpoints are kept, older ones are deleted", output_dir, total_limit)


def latest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is complete and has correct checksums; None if there is none.

    Logs a warning for each broken one.
    """
    for _, folder in numbered(output_dir):
        try:
            read(folder)
        except TrainingError as error:
            logger.warning("skipped: %s", error)
        else:
            return folder
    return None


def read(folder: str | Path) -> dict[str, Any]:
    """Verify a checkpoint and return its JSON content: `step`, `fingerprint`, `values`.

    Raises:
        TrainingError: it is incomplete, truncated or was modified.
    """
    folder = Path(folder)
    try:
        content: dict[str, Any] = json.loads((folder / VALUES).read_text(encoding="utf-8"))
        checksums = content.pop("sha256")
        intact = checksums == {ARRAYS: file_hash(folder / ARRAYS), VALUES: _digest(content)}
        int(content["step"]), dict(content["fingerprint"]), dict(content["values"])
    except FileNotFoundError as error:
        raise TrainingError(f"{folder}: incomplete checkpoint: {Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise TrainingError(f"{folder}: broken checkpoint: {VALUES} cannot be read ({error})") from error
    if not intact:
        raise TrainingError(f"{folder}: broken checkpoint: wrong checksum; resume from another one")
    return content


def load(
    folder: str | Path,
    objects: Mapping[str, Stateful],
    *,
    fingerprint: Mapping[str, Any] | None = None,
    compared: Collection[str] | None = None,
    allow_changes: bool = False,
) -> int:
    """Restore all objects from a checkpoint, or none.

    Args:
        compared: names of the fingerprint to compare; None for all.
        allow_changes: log a warning instead of an error if the fingerprint differs.

    Returns:
        number of optimizer updates made.

    Raises:
        TrainingError: the checkpoint is broken, or its entries are not exactly those of the objects.
        SettingsError: the fingerprint differs; the message says in what.
    """
    content = read(folder)
    before, now = content["fingerprint"], dict(fingerprint or {})
    ignored = () if compared is None else (before.keys() | now.keys()) - set(compared)
    if changed := differences(before, now, ignored=ignored):
        refuse_changes(folder, changed, allow_changes=allow_changes)
    arrays, _ = read_safetensors(Path(folder) / ARRAYS)
    restore(objects, arrays, content["values"], where=str(folder))  # drops the old arrays
    mx.eval(arrays)  # arrays are read lazily, and the file may be deleted before they are used
    return int(content["step"])


def check_update(path: Path, update: int, total: int, changed: Sequence[str], *, length: str, folder: str) -> None:
    """Check that a run can continue after a checkpoint's update.

    Args:
        changed: differences from the run before, one text each.
        length, folder: flags, for messages.

    Raises:
        SettingsError: the run ends before the update, or at it and there are changes.
    """
    if update > total:
        raise SettingsError(f"{path} is of update {update}, and this run ends after {total}; raise {length}")
    if changed and update == total:
        raise SettingsError(
            f"{path} is of the last update, so nothing is left for the changes ({listed(changed, 80)}); raise"
            f" {length}, go back to an earlier checkpoint, or give another {folder}"
        )


def check_shapes(folder: str | Path, shapes: Mapping[str, tuple[int, ...]], *, cure: str) -> None:
    """Compare the arrays of the first object in `shapes` with those of a checkpoint; reads only its header.

    Args:
        shapes: shapes by name, all of one object.
        cure: what to do, for the message.

    Raises:
        TrainingError: arrays are missing, unknown or misshapen.
    """
    kind = next(iter(shapes)).partition("/")[0] + "/"
    stored = {
        name: tuple(entry[0]) for name, entry in header(Path(folder) / ARRAYS)[0].items() if name.startswith(kind)
    }
    faults = [f"missing {name}" for name in shapes if name not in stored]
    faults += [f"unknown {name}" for name in stored if name not in shapes]
    faults += [
        f"{name} is {stored[name]}, expected {shape}"
        for name, shape in shapes.items()
        if stored.get(name, shape) != shape
    ]
    if faults:
        raise TrainingError(f"{folder} cannot be restored: {listed(faults, 100)}; {cure}")


def refuse_changes(folder: str | Path, changed: Sequence[str], *, allow_changes: bool = False) -> None:
    """
    Raises:
        SettingsError: without `allow_changes`; with it, a warning is logged.
    """
    if not allow_changes:
        raise SettingsError(
            f"{folder}: belongs to another run: {listed(changed)}; repeat the settings of that run, use a new"
            " --output_dir, or continue with --allow_changes"
        )
    logger.warning("%s: continuing with changes: %s", folder, listed(changed))


def numbered(output_dir: str | Path) -> list[tuple[int, Path]]:
    """(update, folder) of every checkpoint, newest first, including one that is being replaced."""
    output_dir = Path(output_dir)
    folders = {folder.name: folder for folder in output_dir.iterdir()} if output_dir.is_dir() else {}
    checkpoints = []
    for name, folder in folders.items():
        replaced = _REPLACED.fullmatch(name)
        if replaced and f"checkpoint-{replaced[1]}" in folders:
            continue
        if (match := replaced or _NAME.fullmatch(name)) and folder.is_dir():
            checkpoints.append((int(match[1]), folder))
    return sorted(checkpoints, reverse=True)


def clean_up(output_dir: Path) -> None:
    """Finish interrupted operations: delete partial checkpoints, restore one whose replacement was not completed."""
    for leftover in output_dir.glob(".checkpoint-*"):
        replaced = _REPLACED.fullmatch(leftover.name)
        if replaced and not (output_dir / f"checkpoint-{replaced[1]}").exists():
            leftover.rename(output_dir / f"checkpoint-{replaced[1]}")
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk. On macOS `fsync` ends at the cache of the drive."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            from fcntl import F_FULLFSYNC, fcntl  # type: ignore[attr-defined]

            fcntl(handle, F_FULLFSYNC)
        except (ImportError, OSError):  # another system, or a volume without it, such as a network share
            os.fsync(handle)
    finally:
        os.close(handle)
