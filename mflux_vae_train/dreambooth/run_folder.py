"""The output folder of a run: its files, and the status of the run in it.

``run.json`` identifies the run: the settings that affect the result, and hashes of the instance images and of the
weights before the training. The same command continues an unfinished run. A command for another run is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux_vae.errors import MfluxVaeError, SettingsError
from mflux_vae.utils.redaction import redacted
from mflux_vae.weights.formats.files import write_json, write_text
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.fingerprint import settings_identity
from mflux_vae_train.settings import flags

RESUMABLE_CHANGES = frozenset(
    {
        *("model", "instance_data_dir", "class_data_dir", "output_dir"),  # their contents count, not their paths
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "allow_changes", "dry_run"),
        *("report_to", "logging_dir", "sample_batch_size"),
        *("revision", "variant"),  # the weights count
        *("gradient_checkpointing", "memory_limit", "estimate_for"),  # the result is the same
        *("encodings_dir", "lora_weights"),  # their contents count
    }
)
"""Settings that may change when a run is continued: they do not affect its result."""

logger = logging.getLogger(__name__)


class RunFolder:
    """Paths in an output folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = root / "pytorch_lora_weights.safetensors"
        self.samples = root / "samples"
        self.metrics = root / "metrics.jsonl"
        self.loss_curve = root / "loss.png"
        self.report = root / "report.html"
        self.log = root / "train.log"
        self.settings = root / "settings.yaml"
        self.card = root / "README.md"
        self.encodings = root / "encodings"
        self.identity = root / "run.json"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far a run has come.

    Attributes:
        complete: the run is finished.
        checkpoint: where to continue; None to start from the beginning.
    """

    complete: bool = False
    checkpoint: Path | None = None


def run_identity(settings: DreamBoothSettings, *, base: str, images: str) -> dict[str, Any]:
    """What distinguishes a run from others: plain values by name.

    Args:
        settings: resolved.
        base: fingerprint of the weights before the training.
        images: fingerprint of the instance images.
    """
    return {**settings_identity(settings, RESUMABLE_CHANGES), "base weights": base, "instance pictures": images}


def read_status(
    folder: RunFolder, identity: Mapping[str, Any], resume_from: str | None, *, allow_changes: bool = False
) -> RunStatus:
    """Read how far the run with this identity has come in the folder.

    Args:
        resume_from: None or ``latest`` for the newest checkpoint in the folder, or the path of one.
        allow_changes: log differences between the run in the folder and this one as a warning, and continue.

    Raises:
        SettingsError: the folder holds another run (the message lists the differences), or files of unknown origin,
            or there is no such checkpoint.
    """
    for place in (folder.root, *folder.root.parents):
        if place.is_file():
            raise SettingsError(f"--output_dir {folder.root}: {place} is a file, not a folder")
    before = _read(folder)
    differences = [] if before is None else checkpoint.differences(before["identity"], identity)
    if before is None:
        _refuse_foreign_files(folder, identity)
    elif differences and not allow_changes:
        raise SettingsError(
            f"--output_dir {folder.root} holds another run ({'; '.join(differences)}): repeat its settings to continue"
            " it, give another folder, or continue with these changes by --allow_changes"
        )
    elif differences:
        logger.warning("continuing the run in %s with changes: %s", folder.root, "; ".join(differences))
    if resume_from not in (None, "latest"):
        path = Path(resume_from)
        if not path.is_dir():
            raise SettingsError(f"--resume_from_checkpoint {path} is not a folder: give 'latest' or a checkpoint-N")
        return RunStatus(checkpoint=path)
    if before is not None and before["finished"] and not differences and _has_result(folder, before):
        return RunStatus(complete=True)
    return RunStatus(checkpoint=checkpoint.latest(folder.root))


def start(folder: RunFolder, identity: Mapping[str, Any], settings: DreamBoothSettings, lock: Lock) -> None:
    """Take the folder's lock, and write run.json and settings.yaml, which reproduces the run."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        checkpoint.clean_up(folder.root)
        write_json(folder.identity, {"identity": identity, "finished": False})
        reproducing = dataclasses.replace(settings, resume_from_checkpoint=None, allow_changes=False, dry_run=False)
        write_text(folder.settings, flags.to_yaml(reproducing))
    except OSError as error:
        raise SettingsError(f"--output_dir {folder.root} cannot be written ({error.strerror})") from error


def finish(folder: RunFolder, identity: Mapping[str, Any], result: Path) -> None:
    """Record that the run is complete, and the name of its result."""
    write_json(folder.identity, {"identity": identity, "finished": True, "result": result.name})


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log to a file, and the error that ends the block early."""
    package = logging.getLogger("mflux_vae_train")
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    try:
        yield
    except BaseException as error:
        # Only to the file: the caller prints it on the console. Wrong input and signals need no traceback.
        trace = None if isinstance(error, (MfluxVaeError, KeyboardInterrupt)) else sys.exc_info()
        message = f"ended by {type(error).__name__}: {error}"
        handler.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, message, None, trace))
        raise
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """Redacts secrets, and drops lines that cannot be written: a full disk does not end the run."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def _read(folder: RunFolder) -> dict[str, Any] | None:
    try:
        content = json.loads(folder.identity.read_text(encoding="utf-8"))
        return {"identity": dict(content["identity"]), "finished": bool(content["finished"]), **content}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SettingsError(
            f"{folder.identity} is broken ({type(error).__name__}): delete it or give another --output_dir"
        ) from error


def _has_result(folder: RunFolder, content: Mapping[str, Any]) -> bool:
    return (folder.root / content.get("result", folder.adapter.name)).exists()


def _refuse_foreign_files(folder: RunFolder, identity: Mapping[str, Any]) -> None:
    """Refuse a folder without run.json whose files the run would overwrite, unless a checkpoint there is this run's."""
    written = (folder.adapter, folder.metrics, folder.samples, folder.card, folder.settings, folder.report)
    endangered = [path for path in written if path.exists()]
    endangered += sorted(folder.root.glob("checkpoint-*"))
    if not endangered:
        return
    if (newest := checkpoint.latest(folder.root)) is not None:
        fingerprint = checkpoint.read(newest)["fingerprint"]
        if not checkpoint.differences({name: fingerprint.get(name) for name in identity}, identity):
            return
    names = ", ".join(path.name for path in endangered)
    raise SettingsError(f"--output_dir {folder.root} holds {names}, but no run.json: give another folder")
