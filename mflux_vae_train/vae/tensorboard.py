"""Events for TensorBoard, which is an extra and imported when they are asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from mflux_vae.errors import SettingsError
from mflux_vae_train.hooks import Record


class Events:
    """Writes every update's metrics, and validations', as scalars. A hook.

    Args:
        folder: for the event files; a resumed run adds one.

    Raises:
        SettingsError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise SettingsError(f"--tensorboard: pip install 'mflux-vae[tensorboard]' ({error})") from error
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary, self._writer = Event, Summary, EventFileWriter(str(folder))

    def __call__(self, record: Record) -> None:
        self._write("train", record.update, record.metrics)

    def validation(self, record: Record, metrics: Mapping[str, float]) -> None:
        """Of the network after that update."""
        self._write("validation", record.update, metrics)

    def _write(self, group: str, update: int, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in metrics.items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=update, summary=summary))

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
