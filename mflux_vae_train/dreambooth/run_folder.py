"""The output folder of a run: its files.

``run.json`` identifies the run: the settings that affect the result, and hashes of the instance images and of the
weights before the training. The same command continues an unfinished run, see `run_status`.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mflux_vae.errors import MfluxVaeError, SettingsError
from mflux_vae.utils.links import missing
from mflux_vae.utils.redaction import redacted
from mflux_vae.weights.formats.files import write_json, write_text
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.checkpointing.branch import Branch, abandon
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.dreambooth.best_adapter import read_best
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.settings import flags
from mflux_vae_train.settings.values import DERIVED, read_file

RESUMABLE_CHANGES = frozenset(
    {
        *("model", "instance_data_dir", "class_data_dir", "output_dir"),  # their contents count, not their paths
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "allow_changes", "dry_run"),
        *("report_to", "logging_dir", "sample_batch_size", "output_kohya_format", "fuse", "fuse_single_file"),
        *("validation_prompt", "validation_steps", "validation_epochs", "num_validation_images"),
        *("validation_data_dir", "validation_loss_steps", "keep_best", "open_report"),
        *("use_8bit_adam", "with_prior_preservation", "scale_lr"),  # other names of settings that count
        "bnb_quantization_config_path",
        *("revision", "variant", "vae"),  # the weights count
        *("gradient_checkpointing", "exact_micro_batches", "memory_limit"),  # the same, up to rounding
        *("estimate_for", "caffeinate"),
        *("encodings_dir", "lora_weights", "assistant_lora", "caption_column"),  # their contents count
    }
)
"""Settings that may change when a run is continued: they do not affect its result."""


ADAPTER = "pytorch_lora_weights.safetensors"
"""The adapter, in the output folder, in each checkpoint and in ``best``; diffusers looks for this name."""


BEST = "best"
"""Folder of the adapter with the lowest held-out loss."""


class RunFolder:
    """Paths in an output folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.adapter = root / ADAPTER
        self.best = root / BEST
        self.samples = root / "samples"
        self.metrics = root / "metrics.jsonl"
        self.loss_curve = root / "loss.png"
        self.report = root / "report.html"
        self.log = root / "train.log"
        self.settings = root / "settings.yaml"
        self.card = root / "README.md"
        self.encodings = root / "encodings"
        self.identity = root / "run.json"
        self.evaluation = root / "evaluation"


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path belongs to: that folder, a checkpoint or ``best`` in it, or a file in these."""
    if not path.exists():
        return None
    folder = (path if path.is_dir() else path.parent).resolve()
    inside = folder.name == BEST or folder.name.startswith("checkpoint-")
    for root in (folder, folder.parent) if inside else (folder,):
        if RunFolder(root).identity.is_file() and RunFolder(root).settings.is_file():
            return root
    return None


def read_settings(root: Path) -> dict[str, Any]:
    """The settings of the run in a folder, those that were derived included.

    Raises:
        SettingsError: they cannot be read.
    """
    stated = read_file(DreamBoothSettings, RunFolder(root).settings)
    return {**stated, **stated.pop(DERIVED, {})}


def claim(folder: RunFolder, lock: Lock) -> None:
    """Create the folder, take its lock, and remove what an interrupted save left."""
    with _writing(folder):
        folder.root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        checkpoint.clean_up(folder.root)
        with tempfile.TemporaryFile(dir=folder.root):  # it can be written
            pass


def start(
    folder: RunFolder,
    identity: Mapping[str, Any],
    settings: DreamBoothSettings,
    given: DreamBoothSettings,
    branch: Branch = None,
    abandoned: Sequence[Path] = (),
) -> None:
    """Write run.json and settings.yaml, which reproduces the run. Called when nothing can refuse the run any more.

    Args:
        settings: resolved.
        given: the settings that they were resolved from.
        branch, abandoned: see `checkpointing.branch`.
    """
    with _writing(folder):
        if abandoned and branch is not None:
            after, moved = int(branch["update"]), [*folder.samples.glob("step-*.png")]
            best = read_best(folder.best / ADAPTER)
            if best is not None and (best.update > after or Path(branch["checkpoint"]).is_absolute()):
                moved.append(folder.best)
            abandon(folder.root, abandoned, after=after, moved=moved, copied=folder.metrics)
        write_json(folder.identity, _record(identity, branch, finished=False))
        of_one_call = ("resume_from_checkpoint", "allow_changes", "dry_run")
        write_text(folder.settings, flags.to_yaml(settings, given, omit=of_one_call))


def finish(folder: RunFolder, identity: Mapping[str, Any], result: Path, branch: Branch = None) -> None:
    """Record that the run is complete, and the name of its result."""
    write_json(folder.identity, {**_record(identity, branch, finished=True), "result": result.name})


def _record(identity: Mapping[str, Any], branch: Branch, *, finished: bool) -> dict[str, Any]:
    return {"identity": identity, "finished": finished, **({"branch": branch} if branch is not None else {})}


@contextmanager
def _writing(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = missing(folder.root, f"cannot be written ({error.strerror})", "remove the link")
        raise SettingsError(f"--output_dir {folder.root} {reason}") from error


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log to a file, and the error that ends the block early."""
    package = logging.getLogger("mflux_vae_train")
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level, propagate, host = package.level, package.propagate, _ToHost(package)
    for one in (handler, host):
        package.addHandler(one)
    package.propagate = False
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
        package.propagate = propagate
        for one in (handler, host):
            package.removeHandler(one)
        handler.close()


class _ToHost(logging.Handler):
    """Passes a logger's records on as before: from the level of its host on, and if there is no handler, warnings."""

    def __init__(self, package: logging.Logger) -> None:
        super().__init__(package.getEffectiveLevel())
        handled = package.hasHandlers()
        self._parent = package.parent if package.propagate and package.parent is not None else None
        self._passes = self._parent is not None and (self._parent.hasHandlers() or not handled)

    def emit(self, record: logging.LogRecord) -> None:
        if self._passes and self._parent is not None:
            self._parent.callHandlers(record)


class _LogFile(logging.FileHandler):
    """Redacts secrets, and drops lines that cannot be written: a full disk does not end the run."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()
