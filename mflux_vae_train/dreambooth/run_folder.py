"""The output folder of a run: what lies where, and whether it belongs to the run that is asked for.

``run.json`` says which run a folder holds: the settings that shape the result, and hashes of the instance
pictures and of the weights that the run began from. The same command continues an unfinished run; any other run is
refused.
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
        *("model", "instance_data_dir", "class_data_dir", "output_dir"),  # what is there counts, not where it lies
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "allow_changes", "dry_run"),
        *("report_to", "logging_dir", "sample_batch_size"),
        *("revision", "variant"),  # the weights count, not where they are from
        *("gradient_checkpointing", "memory_limit"),  # what takes less memory gives the same result
        *("encodings_dir", "lora_weights"),  # what is in them counts, too
    }
)
"""Settings that may change when a run is continued: they do not shape its result."""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Names in an output folder."""

    root: Path

    @property
    def adapter(self) -> Path:
        return self.root / "pytorch_lora_weights.safetensors"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def loss_curve(self) -> Path:
        return self.root / "loss.png"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def log(self) -> Path:
        return self.root / "train.log"

    @property
    def settings(self) -> Path:
        return self.root / "settings.yaml"

    @property
    def card(self) -> Path:
        return self.root / "README.md"

    @property
    def encodings(self) -> Path:
        return self.root / "encodings"

    @property
    def identity(self) -> Path:
        return self.root / "run.json"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far the run asked for has come in its folder.

    Attributes:
        complete: it was finished; there is nothing to do.
        checkpoint: where to continue, None for the beginning.
    """

    complete: bool = False
    checkpoint: Path | None = None


def identity_of(settings: DreamBoothSettings, *, base: str, pictures: str) -> dict[str, Any]:
    """What makes a run this run: plain values by name.

    Args:
        settings: with nothing left open.
        base: fingerprint of the weights that are to be trained.
        pictures: fingerprint of the instance pictures.
    """
    return {**settings_identity(settings, RESUMABLE_CHANGES), "base weights": base, "instance pictures": pictures}


def standing(
    folder: RunFolder, identity: Mapping[str, Any], resume_from: str | None, *, allow_changes: bool = False
) -> RunStatus:
    """Looks, and changes nothing.

    Args:
        resume_from: None or ``latest`` for the newest checkpoint in the folder, or the path of one.
        allow_changes: another run in the folder is continued, too, and what differs is a warning.

    Raises:
        SettingsError: the folder holds another run (the differences are listed), or files of which it is not
            known which run they are from; or there is no such checkpoint.
    """
    for place in (folder.root, *folder.root.parents):
        if place.is_file():
            raise SettingsError(f"--output_dir {folder.root}: {place} is a file, not a folder")
    before = _read(folder)
    differences = [] if before is None else checkpoint.differences(before["identity"], identity)
    if before is None:
        _refuse_strangers(folder, identity)
    elif differences and not allow_changes:
        raise SettingsError(
            f"--output_dir {folder.root} holds another run ({'; '.join(differences)}): repeat its settings to continue"
            " it, give another folder, or continue it all the same with --allow_changes"
        )
    elif differences:
        logger.warning("the run in %s goes on with changes: %s", folder.root, "; ".join(differences))
    if resume_from not in (None, "latest"):
        path = Path(resume_from)
        if not path.is_dir():
            raise SettingsError(f"--resume_from_checkpoint {path} is not a folder: give 'latest' or a checkpoint-N")
        return RunStatus(checkpoint=path)
    if before is not None and before["finished"] and not differences and _has_result(folder, before):
        return RunStatus(complete=True)
    return RunStatus(checkpoint=checkpoint.latest(folder.root))


def claim(folder: RunFolder, identity: Mapping[str, Any], settings: DreamBoothSettings, lock: Lock) -> None:
    """Makes the folder this run's: takes its lock, writes run.json, and settings.yaml, which reproduces the run."""
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
    """Notes that the run is complete, and which file or folder is its result."""
    write_json(folder.identity, {"identity": identity, "finished": True, "result": result.name})


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within the block, what this package logs is appended to a file, too, and so is what ends it early."""
    package = logging.getLogger("mflux_vae_train")
    handler = _Log(path, encoding="utf-8")
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(min(package.getEffectiveLevel(), logging.INFO))
    try:
        yield
    except BaseException as error:
        # To the file alone: on the console the caller says it. Mistakes and signals need no traceback.
        trace = None if isinstance(error, (MfluxVaeError, KeyboardInterrupt)) else sys.exc_info()
        said = f"ended by {type(error).__name__}: {error}"
        handler.handle(logging.LogRecord(__name__, logging.ERROR, __file__, 0, said, None, trace))
        raise
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


class _Log(logging.FileHandler):
    """A full disk costs lines of the log, not the run, and no traceback on the console for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


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


def _refuse_strangers(folder: RunFolder, identity: Mapping[str, Any]) -> None:
    """Files that a run would overwrite, in a folder that is no run's; a checkpoint of this run vouches for them."""
    written = (folder.adapter, folder.metrics, folder.samples, folder.card, folder.settings, folder.report)
    threatened = [path for path in written if path.exists()]
    threatened += sorted(folder.root.glob("checkpoint-*"))
    if not threatened:
        return
    if (newest := checkpoint.latest(folder.root)) is not None:
        told = checkpoint.read(newest)["fingerprint"]
        if not checkpoint.differences({name: told.get(name) for name in identity}, identity):
            return
    names = ", ".join(path.name for path in threatened)
    raise SettingsError(f"--output_dir {folder.root} holds {names}, but no run.json: give another folder")
