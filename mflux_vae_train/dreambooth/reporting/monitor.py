"""All that is seen of a run while it goes on: its metrics file, the bar, trackers, previews and the report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.dreambooth.reporting.previews import Previews
from mflux_vae_train.dreambooth.reporting.report import Report
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.monitoring.progress import Pace, ProgressBar
from mflux_vae_train.monitoring.trackers import open_tracker, requested_trackers
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.training.hooks import Hook, MetricsLog, Record, resource_usage


class Monitor:
    """Located before the first update and closed after the last.

    Args:
        prompts: conditioning of each validation prompt, one row.
        start: updates made before.
        processes: of several processes all draw previews, and the first one writes.

    Attributes:
        observers: for `loop.fit`.
        pace: the time left; hooks that take long go through it.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[Conditioning],
        run: Preparation,
        folder: RunFolder,
        *,
        start: int,
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self._pipeline, self._prompts, self._run, self._folder, self._start = pipeline, prompts, run, folder, start
        self._processes = processes
        self._stack, self._report = ExitStack(), Report(pipeline.name, run, folder)
        self._updates, self._of = start, run.choices.plan.updates
        self.pace = Pace(run.choices.plan.updates)
        self.observers: list[Hook] = [self.pace, self._count]

    def __enter__(self) -> Monitor:
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _open(self) -> None:
        run, folder, total, start = self._run, self._folder, self._run.choices.plan.updates, self._start
        settings, enter = run.choices.settings, self._stack.enter_context
        logging_dir = Path(settings.logging_dir) if settings.logging_dir else folder.root / "logs"
        shown = dataclasses.asdict(settings)
        first = self._processes.is_main
        # before anything is told: what a part of the run left that is made again does not count
        files = [enter(MetricsLog(folder.metrics, resumed_at=start, extra=resource_usage))] if first else []
        trackers = [
            enter(open_tracker(name, logging_dir, run=folder.root.resolve().name, settings=shown, start=start))
            for name in requested_trackers(settings.report_to)
            if first
        ]
        self._previews = Previews(
            self._pipeline,
            self._prompts,
            run.choices,
            instance=[image.path for image in run.pictures.images],
            samples=folder.samples,
            trackers=trackers,
            processes=self._processes,
        )
        began = time.monotonic()
        if start == 0:
            self._previews(0)
            self._tell("running", updates=0)
        self._preview_seconds = time.monotonic() - began
        if first:
            bar = enter(ProgressBar(total, start, extra=self._speed, pace=self.pace))
            self.observers += [*files, bar, *trackers]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is not None:
            self._tell("stopped", updates=self._updates, said=" ".join(str(error).split()) or type(error).__name__)

    def previews(self) -> Hook:
        """The hook that draws them when they are due."""

        def preview(record: Record) -> None:
            self._previews(record.update)
            self._tell("running", updates=record.update, said=self._left(record.update))

        return self.pace.timed_every(self._run.choices.validation_steps, preview, seconds=self._preview_seconds)

    def finished(self, said: str) -> None:
        """Writes the report for the last time."""
        self._tell("finished", updates=self._of, said=said)

    def _tell(self, state: str, *, updates: int, said: str = "") -> None:
        if self._processes.is_main:
            self._report.write(state, updates=updates, said=said)

    def _left(self, update: int) -> str:
        return f"after update {update} of {self._of}, {self.pace.eta_text(update)}"

    def _count(self, record: Record) -> None:
        self._updates = record.update

    def _speed(self, record: Record) -> dict[str, str]:
        return {"images/s": f"{record.samples / max(self.pace.per_update, 1e-9):.3g}"}
