"""How far the run in a folder has come, and where a command continues it. ``run.json`` identifies the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae.utils.links import missing
from mflux_vae.weights.formats.files import write_json, write_text
from mflux_vae_train.checkpointing import branch as branches
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.checkpointing.branch import Branch
from mflux_vae_train.checkpointing.differences import differences, listed
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.settings import flags
from mflux_vae_train.training.hooks import read_metrics
from mflux_vae_train.training.lr_schedule import resume_warnings
from mflux_vae_train.training.pending_hooks import last_rate
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.fingerprint import resumable_changes

RECORD = "run.json"
WEIGHTS = ("best_model.safetensors", "last_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """
    Attributes:
        complete: the run is finished.
        checkpoint: where to continue; None to start from the beginning, or if a complete run has none any more.
        update: of the checkpoint.
        branch, abandoned: see `checkpointing.branch`.
        warnings: what the run does differently from the one before, one line each.
    """

    complete: bool = False
    checkpoint: Path | None = None
    update: int = 0
    branch: Branch = None
    abandoned: Sequence[Path] = ()
    warnings: Sequence[str] = ()

    @property
    def starts_branch(self) -> bool:
        """Whether the best weights in the folder may be those of abandoned updates."""
        return self.branch is not None and self.update == self.branch["update"]


def read_status(
    folder: Path,
    identity: Mapping[str, Any],
    settings: VAETrainingSettings,
    *,
    network: nn.Module,
    total: int,
    schedule: Callable[[int], float],
) -> RunStatus:
    """
    Args:
        network: the network that the run trains, or one of the same shape.
        total: updates of the whole run.
        schedule: update -> learning rate.

    Raises:
        SettingsError: the folder holds another run, or weights of unknown origin, or there is no such checkpoint.
        TrainingError: the checkpoint is broken.
    """
    record, ignored = _read(folder), resumable_changes(settings)
    weights = [name for name in WEIGHTS if (folder / name).exists()]
    checkpoints = checkpoint.numbered(folder)
    if record is None and weights and not checkpoints:
        raise SettingsError(
            f"{folder} holds {weights[0]}, but neither {RECORD} nor a checkpoint; give another --experiment_name"
        )
    if not (weights or checkpoints or read_metrics(folder / "metrics.jsonl")):
        record = None  # it ended before its first update
    branch: Branch = None if record is None else record.get("branch")
    changed = [] if record is None else differences(record["identity"], identity, ignored=ignored)
    _refuse(folder, changed, settings)
    name, explicit = settings.resume_from_checkpoint, None
    if name not in (None, "latest") and (changed or not branches.began_at(folder, str(name), branch)):
        explicit = branches.find(folder, str(name))
    finished = record is not None and record["finished"] == total and len(weights) == len(WEIGHTS) and not changed
    if (path := explicit or branches.newest(folder, branch)) is None:
        return RunStatus(complete=finished, warnings=_changes(folder, changed))
    content = checkpoint.read(path)
    start, differing = int(content["step"]), differences(content["fingerprint"], identity, ignored=ignored)
    _refuse(path, differing, settings)
    changed = changed or differing
    parameters: dict[str, Any] = dict(tree_flatten(network.trainable_parameters()))
    shapes = {f"network/{name.replace('.', '/')}": tuple(one.shape) for name, one in parameters.items()}
    checkpoint.check_shapes(path, shapes, cure="repeat the settings of that network, or give another --experiment_name")
    checkpoint.check_update(path, start, total, changed, length="--num_epochs", folder="--experiment_name")
    if finished and not changed and path == branches.newest(folder, branch):
        return RunStatus(complete=True, checkpoint=path, update=start, branch=branch)
    abandoned: Sequence[Path] = ()
    if explicit is not None:
        branch, abandoned = branches.going_back(folder, explicit, start, branch)
    warnings = _changes(folder, changed)
    if abandoned:
        warnings.append(branches.warning(folder, start, abandoned))
    if changed:
        rate = last_rate(content["values"])
        warnings += resume_warnings(
            schedule, start=start, total=total, peak=settings.learning_rate, last_rate=rate, advice="use --init_from"
        )
    return RunStatus(checkpoint=path, update=start, branch=branch, abandoned=abandoned, warnings=warnings)


def start(folder: Path, identity: Mapping[str, Any], settings: VAETrainingSettings, status: RunStatus) -> None:
    """Write run.json and settings.yaml, which reproduces the run, once nothing can refuse it any more."""
    try:
        if status.abandoned:
            moved = [*(folder / "samples").glob("*.png"), *(folder / name for name in WEIGHTS)]
            moved = [path for path in moved if path.exists()]
            metrics = folder / "metrics.jsonl"
            branches.abandon(folder, status.abandoned, after=status.update, moved=moved, copied=metrics)
        _write(folder, identity, status.branch, finished=None)
        reproducing = dataclasses.replace(settings, allow_changes=False, resume_from_checkpoint=None)
        write_text(folder / "settings.yaml", flags.to_yaml(reproducing))
    except OSError as error:
        raise _unwritable(folder, error) from error


def finish(folder: Path, identity: Mapping[str, Any], status: RunStatus, total: int) -> None:
    """Record that the run is complete."""
    _write(folder, identity, status.branch, finished=total)


def _write(folder: Path, identity: Mapping[str, Any], branch: Branch, *, finished: int | None) -> None:
    branched = {} if branch is None else {"branch": branch}
    write_json(folder / RECORD, {"identity": identity, "finished": finished, **branched})


def claim(folder: Path, lock: Lock) -> None:
    """Create the run folder, lock it, and remove what an interrupted save left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        checkpoint.clean_up(folder)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> SettingsError:
    reason = missing(folder, f"cannot be written ({error.strerror})", "remove the link")
    return SettingsError(f"--output_dir: {folder} {reason}")


def _refuse(place: Path, changed: Sequence[str], settings: VAETrainingSettings) -> None:
    if settings.allow_changes:
        return
    if changed and all(text.startswith("num_epochs ") for text in changed):
        raise SettingsError(
            f"{place} holds a run of another length ({listed(changed)}): train its result further by --init_from and"
            " another --experiment_name, or continue it with --allow_changes, a warm restart: the learning rate follows"
            " the schedule of the new length"
        )
    if changed:
        raise SettingsError(
            f"{place} belongs to another run ({listed(changed)}): repeat its settings to continue it, give another"
            " --experiment_name, or continue with these changes by --allow_changes"
        )


def _changes(folder: Path, changed: Sequence[str]) -> list[str]:
    return [f"continuing the run in {folder} with changes: {listed(changed)}"] if changed else []


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        branch = content.get("branch")
        if branch is not None:
            int(branch["update"]), Path(branch["checkpoint"])
        return {"identity": dict(content["identity"]), "branch": branch, "finished": content["finished"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SettingsError(
            f"{path} is broken ({type(error).__name__}): delete it or give another --experiment_name"
        ) from error
