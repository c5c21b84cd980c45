"""The output folder of a run: what lies where, and whether it belongs to the run that is asked for.

``run.json`` says which run a folder holds: the settings that shape the result, and a hash of the instance
pictures. The same command continues an unfinished run; any other run is refused.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux_vae.errors import MfluxVaeError, SettingsError
from mflux_vae_train import checkpoint, flags
from mflux_vae_train.config import DreamBoothSettings

FREE = frozenset(
    {
        *("instance_data_dir", "class_data_dir", "output_dir"),  # the pictures count, not where they lie
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "dry_run"),
    }
)
"""Settings that may change when a run is continued: they do not shape its result."""


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
    def log(self) -> Path:
        return self.root / "train.log"

    @property
    def settings(self) -> Path:
        return self.root / "settings.yaml"

    @property
    def identity(self) -> Path:
        return self.root / "run.json"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far the run asked for has come in its folder.

    Attributes:
        complete: it was finished; there is nothing to do.
        checkpoint: where to continue, None for the beginning.
    """

    complete: bool = False
    checkpoint: Path | None = None


def identity_of(settings: DreamBoothSettings, *, pipeline: str, pictures: str) -> dict[str, Any]:
    """What makes a run this run: plain values by name.

    Args:
        settings: with nothing left open.
        pictures: fingerprint of the instance pictures.
    """
    shaping = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE}
    return {**shaping, "pipeline": pipeline, "instance pictures": pictures}


def standing(folder: RunFolder, identity: Mapping[str, Any], resume_from: str | None) -> Standing:
    """Looks, and changes nothing.

    Args:
        resume_from: None or ``latest`` for the newest checkpoint in the folder, or the path of one.

    Raises:
        SettingsError: the folder holds another run (the differences are listed), or files of which it is not
            known which run they are from; or there is no such checkpoint.
    """
    for place in (folder.root, *folder.root.parents):
        if place.is_file():
            raise SettingsError(f"--output_dir {folder.root}: {place} is a file, not a folder")
    before = _read(folder)
    if before is None:
        _refuse_strangers(folder)
    else:
        differences = _differences(before["identity"], identity)
        if differences:
            raise SettingsError(
                f"--output_dir {folder.root} holds another run ({'; '.join(differences)}): "
                "repeat its settings to continue it, or give another folder"
            )
    if resume_from not in (None, "latest"):
        path = Path(resume_from)
        if not path.is_dir():
            raise SettingsError(f"--resume_from_checkpoint {path} is not a folder: give 'latest' or a checkpoint-N")
        return Standing(checkpoint=path)
    if before is None:
        return Standing()
    if before["finished"] and _has_result(folder, before):
        return Standing(complete=True)
    return Standing(checkpoint=checkpoint.latest(folder.root))


def claim(folder: RunFolder, identity: Mapping[str, Any], settings: DreamBoothSettings) -> None:
    """Makes the folder this run's: writes run.json, and settings.yaml, which reproduces the run."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        _write(folder.identity, json.dumps({"identity": identity, "finished": False}, indent=1))
        reproducing = dataclasses.replace(settings, resume_from_checkpoint=None, dry_run=False)
        _write(folder.settings, flags.to_yaml(reproducing))
    except OSError as error:
        raise SettingsError(f"--output_dir {folder.root} cannot be written ({error.strerror})") from error


def finish(folder: RunFolder, identity: Mapping[str, Any], result: Path) -> None:
    """Notes that the run is complete, and which file or folder is its result."""
    content = {"identity": identity, "finished": True, "result": result.name}
    _write(folder.identity, json.dumps(content, indent=1))


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Within the block, what this package logs is appended to a file, too, and so is what ends it early."""
    package = logging.getLogger("mflux_vae_train")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
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


def _read(folder: RunFolder) -> dict[str, Any] | None:
    try:
        content = json.loads(folder.identity.read_text(encoding="utf-8"))
        return {"identity": dict(content["identity"]), "finished": bool(content["finished"]), **content}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{folder.identity} is broken ({type(error).__name__}): delete it or give another --output_dir"
        ) from error


def _has_result(folder: RunFolder, content: Mapping[str, Any]) -> bool:
    return (folder.root / content.get("result", folder.adapter.name)).exists()


def _refuse_strangers(folder: RunFolder) -> None:
    """Files that a run would overwrite, in a folder that is no run's."""
    threatened = [path for path in (folder.adapter, folder.metrics, folder.samples) if path.exists()]
    threatened += sorted(folder.root.glob("checkpoint-*"))
    if threatened:
        names = ", ".join(path.name for path in threatened)
        raise SettingsError(f"--output_dir {folder.root} holds {names}, but no run.json: give another folder")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    now = json.loads(json.dumps(now))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
