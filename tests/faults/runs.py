"""Small trainings as commands, started, ended and compared: what `tests.faults` makes suffer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux_vae.errors import MfluxVaeError
from mflux_vae.images import load_image
from mflux_vae.weights.formats.files import header
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.training.hooks import NONDETERMINISTIC, read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLE = Path(tiny.__file__).parent / "example"

TIMELY = ("train.log", "run.json", "settings.yaml", "README.md", "report.html", "loss.png")
"""Files that tell when, where and how fast a run was made, or that are drawn from others."""


class Wrong(Exception):
    """What should not have happened, in one line."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A command that trains.

    Attributes:
        flags: without those that name folders.
        data: name of the flag for the pictures.
        home: folder of the run, below --output_dir.
        interval: updates between checkpoints.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    data: str
    home: str
    interval: int

    def command(self, out: Path, pictures: Path, faulty: Sequence[str] = ()) -> list[str]:
        """What to start; `faulty` are flags of `tests.faults.inject`."""
        before = ["tests.faults.inject", *faulty, self.module] if faulty else [self.module]
        return [sys.executable, "-m", *before, *self.flags, f"--{self.data}={pictures}", f"--output_dir={out}"]

    def start(self, out: Path, pictures: Path = EXAMPLE, faulty: Sequence[str] = (), **options: Any) -> Process:
        return Process(self.command(out, pictures, faulty), **{"said": out.parent / "said", **options})

    def folder(self, out: Path) -> Path:
        return out / self.home


DREAMBOOTH = Training(
    name="DreamBooth",
    module="mflux_vae_train.dreambooth.cli",
    flags=(
        *("--model=tiny", "--instance_prompt=a photo of xyz star", "--max_train_steps=6", "--lr_warmup_steps=2"),
        *("--gradient_accumulation_steps=4", "--num_class_images=3", "--lora_dropout=0.1", "--rank=4"),
        *("--checkpointing_steps=2", "--validation_steps=3", "--num_validation_images=1"),
        *("--validation_share=0.2", "--validation_loss_steps=1", "--keep_best"),
    ),
    data="instance_data_dir",
    home=".",
    interval=2,
)
AUTOENCODER = Training(
    name="autoencoder",
    module="mflux_vae.cli",
    flags=(
        *("train", "--preset=mnist", "--in_channels=3", "--image_size=32", "--hidden_dims", "8", "16"),
        *("--latent_dim=4", "--batch_size=1", "--gradient_accumulation_steps=2", "--num_epochs=6", "--val_share=0.2"),
        *("--ema_decay=0.9", "--samples_every=2", "--experiment_name=run"),
    ),
    data="data",
    home="checkpoints/run",
    interval=2,
)
TRAININGS = (DREAMBOOTH, AUTOENCODER)


class Process:
    """A training that runs.

    Args:
        limit: largest size of a file that it may write, in bytes.
        said: file for what it says.
    """

    def __init__(self, command: Sequence[str], *, said: Path, limit: int | None = None) -> None:
        self._said = said
        with said.open("wb") as file:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, preexec_fn=_limited(limit) if limit else None
            )

    def said(self) -> str:
        return self._said.read_text(errors="replace")

    def wait_for(self, there: Callable[[], bool], seconds: float = 300) -> bool:
        """Until something is there, or the process has ended: whether it is there."""
        end = time.monotonic() + seconds
        while not there() and self.popen.poll() is None:
            if time.monotonic() > end:
                raise Wrong("a training hangs")
            time.sleep(0.005)
        return there()

    def end(self) -> tuple[int, str]:
        """Its exit status and all that it said; a traceback is never among it."""
        status = self.popen.wait(600)
        said = self.said()
        if "Traceback" in said:
            raise Wrong(f"a traceback: {said[-300:]!r}")
        return status, said

    def refused(self, status: int, *words: str) -> None:
        """It ended with this status and one line that has the words."""
        found, said = self.end()
        lines = [line for line in said.splitlines() if ": error: " in line]
        if found != status or len(lines) != 1 or not all(word in lines[0] for word in words):
            raise Wrong(f"exit status {found} where {status} was due, saying {said[-300:]!r}")

    def finished(self) -> None:
        """It ended well."""
        status, said = self.end()
        if status:
            raise Wrong(f"exit status {status}: {said[-300:]!r}")


def _limited(size: int) -> Callable[[], None]:
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def left(folder: Path) -> dict[str, bytes]:
    """What a run leaves, by name: contents but for times. Hidden files are what a killed process had begun."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_file() and path.suffix == ".jsonl":
            lines = [
                {key: value for key, value in line.items() if key not in NONDETERMINISTIC}
                for line in read_metrics(path)
            ]
            found[name] = json.dumps(lines).encode()
        elif path.is_file() and path.name not in TIMELY:
            found[name] = path.read_bytes()
    return found


def same(folder: Path, expected: dict[str, bytes]) -> None:
    """The folder has what a run that suffered nothing leaves, to the bit. Of checkpoints it is the last one's."""
    found = left(folder)
    last = max((n.split("/")[0] for n in {*found, *expected} if n.startswith("checkpoint-")), key=lambda n: (len(n), n))
    differing = [
        name
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name) and (not name.startswith("checkpoint-") or name.startswith(last + "/"))
    ]
    if differing:
        raise Wrong(f"another result in {', '.join(differing)}")


def intact(folder: Path) -> None:
    """No file is half written under its final name."""
    try:
        for path in folder.rglob("*") if folder.is_dir() else ():
            if path.name.startswith(".") or any(part.startswith(".") for part in path.relative_to(folder).parts):
                continue
            if path.is_dir() and path.name.startswith("checkpoint-"):
                checkpoint.read(path)
            elif path.suffix == ".safetensors":
                header(path)
            elif path.suffix == ".png":
                load_image(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
    except (MfluxVaeError, ValueError) as error:
        raise Wrong(f"half written: {error}") from error


def made(folder: Path) -> int:
    """Updates in the metrics log."""
    return sum(line["update"] > 0 for line in read_metrics(folder / "metrics.jsonl"))


def kept(folder: Path) -> int:
    """Updates in the newest checkpoint."""
    newest = checkpoint.latest(folder)
    return 0 if newest is None else int(newest.name.rpartition("-")[2].removesuffix(".replaced"))


def emptied(folder: Path) -> Path:
    """The folder, new and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def is_root() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0
