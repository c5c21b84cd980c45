"""Trackers for curves and images: TensorBoard and Weights & Biases, optional packages that are imported on use.

A tracker is an observer of the training loop and also takes images.
"""

from __future__ import annotations

import io
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mflux_vae.errors import SettingsError
from mflux_vae.utils.paths import printable
from mflux_vae_train.training.hooks import Record

NAMES = ("tensorboard", "wandb")
"""Names of the packages and of the extras that install them."""


class Tracker(Protocol):
    """Interface of `TensorBoard` and `WandB`."""

    def __call__(self, record: Record) -> None:
        """Log all metrics of an update."""

    def scalars(self, group: str, update: int, metrics: Mapping[str, float]) -> None:
        """Log measurements of the model after an update."""

    def image(self, name: str, update: int, pixels: np.ndarray, caption: str) -> None:
        """Log an image, uint8 (H, W, 3), by the model after an update."""

    def __enter__(self) -> Tracker: ...

    def __exit__(self, kind: object, error: object, trace: object) -> None: ...


def requested_trackers(report_to: str | None) -> Sequence[str]:
    """Names of the trackers in ``--report_to``; `all` means all installed ones.

    Raises:
        SettingsError: a requested tracker is not installed, or none is with `all`.
    """
    if report_to in (None, "none"):
        return ()
    names = [name for name in NAMES if _installed(name)]
    if report_to == "all":
        if not names:
            raise SettingsError(f"--report_to all: no tracker is installed; {', '.join(map(_install, NAMES))}")
        return names
    if report_to not in names:
        raise SettingsError(f"--report_to {report_to}: not installed; {_install(str(report_to))}")
    return (str(report_to),)


def open_tracker(name: str, folder: Path, *, run: str, settings: Mapping[str, Any], start: int) -> Tracker:
    """One of `NAMES`, which writes to a subfolder of `folder`.

    Args:
        run: name of the run.
        settings: shown with the run.
        start: updates made before; reports of later updates are replaced if the tracker can do so.

    Raises:
        SettingsError: it is not installed, or refuses to start.
    """
    kinds: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}
    shown = {key: printable(value) if isinstance(value, str) else value for key, value in settings.items()}
    return kinds[name](folder / name, run=printable(run), settings=shown, start=start)


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: for the files; a resumed run adds one, which replaces values after `start` in earlier ones.
        run, settings: shown as a text if there are settings.

    Raises:
        SettingsError: TensorBoard is not installed.
    """

    def __init__(
        self, folder: Path, *, run: str = "", settings: Mapping[str, Any] | None = None, start: int = 0
    ) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise SettingsError(f"TensorBoard is not installed; {_install('tensorboard')} ({error})") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary, self._writer = event_pb2, summary_pb2.Summary, EventFileWriter(str(folder))
        # readers drop values of earlier files from this step on
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=start + 1, session_log=session))
        if settings:
            shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
            text = tensor_pb2.TensorProto(dtype="DT_STRING", string_val=[_table(run, settings)], tensor_shape=shape)
            plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
            metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
            self._add(start, [self._summary.Value(tag="settings", tensor=text, metadata=metadata)])

    def __call__(self, record: Record) -> None:
        self.scalars("train", record.update, record.metrics)

    def scalars(self, group: str, update: int, metrics: Mapping[str, float]) -> None:
        self._add(update, [self._summary.Value(tag=f"{group}/{name}", simple_value=x) for name, x in metrics.items()])

    def image(self, name: str, update: int, pixels: np.ndarray, caption: str) -> None:
        height, width, _ = pixels.shape
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=_png(pixels))
        self._add(update, [self._summary.Value(tag=f"{name}: {caption}", image=image)])

    def _add(self, update: int, values: Sequence[Any]) -> None:
        self._writer.add_event(
            self._event.Event(wall_time=time.time(), step=update, summary=self._summary(value=values))
        )

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; respects ``WANDB_PROJECT``, ``WANDB_MODE=offline`` and its other variables.

    Args:
        folder: named wandb; for its files and the id of the run.
        run: name of the run.

    Raises:
        SettingsError: wandb is not installed, or refuses to start.
    """

    PROJECT = "dreambooth"

    def __init__(
        self, folder: Path, *, run: str = "", settings: Mapping[str, Any] | None = None, start: int = 0
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SettingsError(f"wandb is not installed; {_install('wandb')} ({error})") from error
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "run-id"
        if start == 0 or not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        options: dict[str, Any] = {} if os.environ.get("WANDB_PROJECT") else {"project": self.PROJECT}
        try:
            self._run = wandb.init(
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                name=run or None,
                dir=str(folder.parent),  # wandb creates a folder named wandb in it
                config=dict(settings or {}),
                **options,
            )
        except Exception as error:  # wandb's exceptions differ between versions
            message = " ".join(str(error).split()).rstrip(".")
            raise SettingsError(
                f"--report_to wandb: {message}; run `wandb login`, or set WANDB_MODE=offline in the environment"
            ) from error
        self._image = wandb.Image

    def __call__(self, record: Record) -> None:
        self.scalars("train", record.update, record.metrics)

    def scalars(self, group: str, update: int, metrics: Mapping[str, float]) -> None:
        self._run.log({f"{group}/{name}": value for name, value in metrics.items()}, step=update)

    def image(self, name: str, update: int, pixels: np.ndarray, caption: str) -> None:
        self._run.log({name: self._image(pixels, caption=caption)}, step=update)

    def __enter__(self) -> WandB:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module without a spec, inserted into sys.modules
        return True


def _install(name: str) -> str:
    return f"pip install 'mflux-vae[{name}]'"


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _table(run: str, settings: Mapping[str, Any]) -> bytes:
    """A Markdown table; a bar in a value would end its cell."""
    rows = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in settings.items()]
    return "\n".join([f"**{run}**", "", "| setting | value |", "|---|---|", *rows]).encode()
