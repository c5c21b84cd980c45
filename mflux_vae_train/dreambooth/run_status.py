"""How far the run in an output folder has come, and where a command continues it. Reads files and writes none."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import first_few
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.checkpointing.branch import Branch, began_at, find, going_back, newest
from mflux_vae_train.checkpointing.differences import BY_FILE, differences, file_differences, file_rows, listed
from mflux_vae_train.dreambooth.data.class_images import CLASS_PICTURES
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.training.hooks import read_metrics
from mflux_vae_train.training.pending_hooks import last_rate

NEEDS_WEIGHTS = frozenset({"base weights", "encoders"})
"""Names of an identity that are known only after weights were read, or downloaded."""

TO_GENERATE = f"{CLASS_PICTURES} to generate"
"""Name in an identity: names of the class images that are missing; then there is no hash of them yet."""

_DRAWING = frozenset({"preview_model", "num_inference_steps"})
"""Settings that the training depends on where class images are to be generated."""

_LENGTHS = frozenset({"max_train_steps", "num_train_epochs"})
"""Settings whose change makes a run longer or shorter."""

_LAYERS = ("rank", "lora_layers", "use_dora", "train_text_encoder", "base weights")
"""Settings that decide the shapes of the trained arrays."""

_STATE = ("train_mode", "optimizer")
"""Settings that decide what a checkpoint contains."""

UNCHANGEABLE = frozenset({*_LAYERS, *_STATE})
"""Settings that a run which is continued cannot change."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far a run has come.

    Attributes:
        complete: the run is finished, and so are the files that the command requests.
        checkpoint: where to continue; None to start from the beginning.
        update: of the checkpoint.
        branch: see `checkpointing.branch`.
        abandoned: later checkpoints, which the run no longer uses.
        last_rate: learning rate of the update before the checkpoint, if known.
        changed: differences from the run before, one text each; only with ``--allow_changes``.
        compared: what the identity was compared with: of run.json and of the checkpoint.
    """

    complete: bool = False
    checkpoint: Path | None = None
    update: int = 0
    branch: Branch = None
    abandoned: Sequence[Path] = ()
    last_rate: float | None = None
    changed: Sequence[str] = ()
    compared: Sequence[Mapping[str, Any]] = ()


def read_status(
    folder: RunFolder,
    identity: Mapping[str, Any],
    resume_from: str | None = None,
    *,
    updates: int,
    requested: Sequence[Path] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    ignored: Collection[str] = (),
    allow_changes: bool = False,
) -> RunStatus:
    """Read how far the run with this identity has come in the folder, and check that it can continue.

    Args:
        resume_from: None or ``latest`` for the newest checkpoint, or a checkpoint: its name in the folder, its path,
            or the path of a folder with checkpoints.
        updates: of the whole run.
        requested: files and folders that a complete run has.
        shapes: shapes of the trained arrays by name in a checkpoint; None if unknown.
        ignored: names of the identity that are not compared.
        allow_changes: continue in spite of differences.

    Raises:
        SettingsError: the folder holds another run (the message lists the differences), or files of unknown origin,
            or there is no such checkpoint.
        TrainingError: the checkpoint is broken, or its arrays have other shapes.
    """
    for place in (folder.root, *folder.root.parents):
        if place.is_file():
            raise SettingsError(f"--output_dir {folder.root}: {place} is a file, not a folder")
    record, checkpoints = read_record(folder), checkpoint.numbered(folder.root)
    if record is None:
        _refuse_foreign_files(folder, identity, ignored)
    elif not (record["finished"] or checkpoints or any(line["update"] for line in read_metrics(folder.metrics))):
        record = None  # it ended before its first update
    before = record or {"identity": identity, "finished": False}
    if (changed := identity_differences(before["identity"], identity, ignored)) and not allow_changes:
        raise SettingsError(_other_run(folder, changed, before["identity"], identity))
    branch = before.get("branch")
    explicit = None
    if resume_from not in (None, "latest") and (changed or not began_at(folder.root, str(resume_from), branch)):
        explicit = find(folder.root, str(resume_from))
    latest = newest(folder.root, branch)
    if before["finished"] and not changed and explicit in (None, latest):
        result = folder.root / str(before.get("result", folder.adapter.name))
        if result.exists() and (latest is None or all(path.exists() for path in requested)):
            return RunStatus(complete=True, branch=branch, compared=[before["identity"]])
    if (path := explicit or latest) is None:
        return RunStatus(changed=changed, compared=[before["identity"]])
    content = checkpoint.read(path)
    start, fingerprint = int(content["step"]), content["fingerprint"]
    if differing := identity_differences(fingerprint, identity, ignored):
        if not allow_changes:
            checkpoint.refuse_changes(path, differing)
        changed = changed or differing
    _check_state(path, fingerprint, identity, shapes)
    checkpoint.check_update(path, start, updates, changed, length="--max_train_steps", folder="--output_dir")
    abandoned: Sequence[Path] = ()
    if explicit is not None:
        branch, abandoned = going_back(folder.root, explicit, start, branch)
    return RunStatus(
        checkpoint=path,
        update=start,
        branch=branch,
        abandoned=abandoned,
        last_rate=last_rate(content["values"]),
        changed=changed,
        compared=[before["identity"], fingerprint],
    )


def read_record(folder: RunFolder) -> dict[str, Any] | None:
    """The content of run.json; None if there is none.

    Raises:
        SettingsError: it is broken.
    """
    try:
        content = json.loads(folder.identity.read_text(encoding="utf-8"))
        branch = content.get("branch")
        if branch is not None:
            int(branch["update"]), Path(branch["checkpoint"])
        return {**content, "identity": dict(content["identity"]), "finished": bool(content["finished"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(
            f"{folder.identity} is broken ({type(error).__name__}): delete it or give another --output_dir"
        ) from error


def identity_differences(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """One text for each difference. Class images that are missing count as generated, with the same content."""
    ignored = {*ignored, TO_GENERATE}
    details = CLASS_PICTURES + BY_FILE
    if CLASS_PICTURES not in before or TO_GENERATE in now:
        ignored.add(CLASS_PICTURES)
    if TO_GENERATE not in now:
        ignored |= _DRAWING
    found = differences(before, now, ignored=ignored)
    if TO_GENERATE in now and (then := file_rows(before, CLASS_PICTURES)) is not None:
        present = {*(row[0] for row in now[details])}
        generated = [row for row in then if row[0] in now[TO_GENERATE] and row[0] not in present]
        if texts := file_differences(then, sorted([*now[details], *generated], key=lambda row: row[0])):
            found.append(f"{CLASS_PICTURES} was changed ({listed(texts, 100)})")
    return found


def _other_run(folder: RunFolder, changed: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    was, wanted = (side.get("max_train_steps") for side in (before, now))
    longer = isinstance(was, int) and isinstance(wanted, int) and wanted > was
    if longer and all(text.partition(" ")[0] in _LENGTHS for text in changed):
        start = (
            f"--model {folder.root}/pipeline" if now.get("train_mode") == "full" else f"--lora_weights {folder.root}"
        )
        return (
            f"--output_dir {folder.root} holds a run of {was} updates ({listed(changed)}): train its result further by"
            f" {start} --output_dir NEW, or continue it with --allow_changes, a warm restart: the learning rate follows"
            " the schedule of the longer run"
        )
    return (
        f"--output_dir {folder.root} holds another run ({listed(changed)}): repeat its settings to continue"
        " it, give another folder, or continue with these changes by --allow_changes"
    )


def _check_state(
    path: Path,
    fingerprint: Mapping[str, Any],
    identity: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """
    Raises:
        SettingsError: the checkpoint is of another optimizer or train mode.
        TrainingError: it has other trained arrays.
    """
    before, now = ({name: side[name] for name in _STATE if name in side} for side in (fingerprint, identity))
    if before and (changed := differences(before, now)):
        raise SettingsError(
            f"{path} cannot be continued: {listed(changed)}; repeat that setting, or start a run with --lora_weights"
            " and another --output_dir"
        )
    if shapes is not None:
        kept = [name for name in _LAYERS if fingerprint.get(name) != identity.get(name)]
        changed = differences(
            {name: fingerprint.get(name) for name in kept}, {name: identity.get(name) for name in kept}
        )
        cure = f"{listed(changed, 80)}: repeat that" if changed else "repeat the settings of that run"
        checkpoint.check_shapes(
            path, shapes, cure=f"{cure}, or start a run with --lora_weights and another --output_dir"
        )


def _refuse_foreign_files(folder: RunFolder, identity: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Refuse a folder without run.json whose files the run would overwrite, unless a checkpoint there is this run's."""
    written = (folder.adapter, folder.best, folder.metrics, folder.samples, folder.card, folder.settings, folder.report)
    endangered = [path for path in written if path.exists()]
    endangered += sorted(folder.root.glob("checkpoint-*"))
    if not endangered:
        return
    if (newest := checkpoint.latest(folder.root)) is not None:
        fingerprint = checkpoint.read(newest)["fingerprint"]
        if not identity_differences({name: fingerprint.get(name) for name in identity}, identity, ignored):
            return
    names = first_few([path.name for path in endangered], 6)
    raise SettingsError(f"--output_dir {folder.root} holds {names}, but no run.json: give another folder")
