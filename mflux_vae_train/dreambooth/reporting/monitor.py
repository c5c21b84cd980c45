"""Everything that shows a run while it trains: metrics file, progress bar, trackers, previews and report."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.dreambooth.reporting import preview_grid
from mflux_vae_train.dreambooth.reporting.held_out import METRIC, HeldOut
from mflux_vae_train.dreambooth.reporting.previews import Previews
from mflux_vae_train.dreambooth.reporting.report import Report
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.monitoring.browser import open_page
from mflux_vae_train.monitoring.progress import Pace, ProgressBar
from mflux_vae_train.monitoring.trackers import Tracker, open_tracker
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.training.hooks import Hook, MetricsLog, Record, resource_usage

logger = logging.getLogger(__name__)

REPORT_INTERVAL = 30.0
"""Seconds between two versions of the report, if previews do not take longer. An open page shows each."""


class Monitor:
    """Context manager around the updates of a run. All processes draw previews; the first one writes.

    Args:
        prompts: conditioning of each validation prompt, one row each.
        held_out: measures the held-out loss; None without held-out images.
        start: number of updates made before.
        change_folder: called when the trackers are open, and before any file of the run changes.

    Attributes:
        observers: for `loop.fit`.
        pace: estimates the time left; it also times slow hooks.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[Conditioning],
        run: Preparation,
        folder: RunFolder,
        *,
        held_out: HeldOut | None = None,
        start: int,
        change_folder: Callable[[], None] = lambda: None,
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self._change_folder = change_folder
        self._pipeline, self._prompts, self._run, self._folder = pipeline, prompts, run, folder
        self._processes, self._start, self._update = processes, start, start
        self._held_out, self._trackers, self._logs = held_out, list[Tracker](), list[MetricsLog]()
        self._total, self._report = run.resolved.max_train_steps, Report(pipeline.name, run, folder)
        self._written, self._longest = time.monotonic(), REPORT_INTERVAL
        self.pace = Pace(self._total)
        self.observers: list[Hook] = [self.pace, self._count]

    def __enter__(self) -> Monitor:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        run, folder, start, is_main = self._run, self._folder, self._start, self._processes.is_main
        resolved, enter = run.resolved, stack.enter_context
        logging_dir = Path(resolved.logging_dir) if resolved.logging_dir else folder.root / "logs"
        options: dict[str, Any] = {
            "run": folder.root.resolve().name,
            "settings": dataclasses.asdict(resolved.to_settings()),
            "start": start,
        }
        names = resolved.trackers if is_main else ()
        self._trackers += [enter(open_tracker(name, logging_dir, **options)) for name in names]
        self._change_folder()
        # before the report is written, as it removes the metrics of updates that are made again
        if is_main:
            self._logs.append(enter(MetricsLog(folder.metrics, resumed_at=start, extra=resource_usage)))
        subjects = preview_grid.subject_count(resolved.num_validation_images) if resolved.num_validation_images else 0
        self._previews = Previews(
            self._pipeline,
            self._prompts,
            resolved,
            drawing=run.drawing,
            subject=[image.read(image.square) for image in run.dataset.images[:subjects]],
            samples=folder.samples,
            trackers=self._trackers,
            processes=self._processes,
        )
        began = time.monotonic()
        if start == 0 and self._held_out is not None:
            self._measure(self._held_out, 0)
        self._measure_seconds, began = time.monotonic() - began, time.monotonic()
        if start == 0:
            self._previews(0)
        self._preview_seconds = time.monotonic() - began if start == 0 else self._expected_preview
        if is_main:
            bar = enter(ProgressBar(self._total, start, extra=self._speed, pace=self.pace))
            self.observers += [*self._logs, bar, *self._trackers, self._refresh]
        self._write_report("running", update=start)
        if is_main and resolved.open_report and (reason := open_page(folder.report)) is not None:
            logger.warning("--open_report: %s; open %s yourself", reason, folder.report)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is not None:
            note = " ".join(str(error).split()) or type(error).__name__
            self._write_report("stopped", update=self._update, note=note)

    def held_out_hooks(self) -> list[Hook]:
        """A hook that measures the held-out loss every `validation_loss_steps`; none without held-out images.

        Call it before the checkpoint: so a run that is continued measures each update once.
        """
        if (held_out := self._held_out) is None:
            return []

        def measure(record: Record) -> None:
            self._measure(held_out, record.update)

        interval = self._run.resolved.validation_loss_steps
        return [self.pace.timed_every(interval, measure, seconds=self._measure_seconds)]

    def _measure(self, held_out: HeldOut, update: int) -> None:
        measured = held_out(update)
        for log in self._logs:
            log.add(update, measured)
        for tracker in self._trackers:
            tracker.scalars("validation", update, {"loss": measured[METRIC]})

    def preview_hook(self) -> Hook:
        """Hook for every `validation_steps`: draw the previews, if there are any, and update the report with them."""

        def preview(record: Record) -> None:
            if self._run.resolved.num_validation_images:
                self._previews(record.update)
                self._write_running(record)

        return self.pace.timed_every(self._run.resolved.validation_steps, preview, seconds=self._preview_seconds)

    def _expected_preview(self) -> float:
        """Seconds, from the time of updates. A forward pass takes about a third of the forward and backward pass."""
        resolved, plan = self._run.resolved, self._run.resolved.plan
        images = resolved.num_validation_images * len(resolved.validation_prompt)
        per_image = self.pace.per_update / (3 * plan.accumulation * plan.batch_size)
        return images * resolved.drawing_steps * per_image

    def finish(self, note: str) -> None:
        """Write the final report."""
        self._write_report("finished", update=self._total, note=note)

    def _refresh(self, record: Record) -> None:
        if time.monotonic() - self._written >= REPORT_INTERVAL:
            self._write_running(record)

    def _write_running(self, record: Record) -> None:
        note = f"after update {record.update} of {self._total}, {self.pace.eta_text(record.update)}"
        self._write_report("running", update=record.update, note=note)

    def _write_report(self, state: str, *, update: int, note: str = "") -> None:
        if self._processes.is_main:
            now = time.monotonic()
            self._longest, self._written = max(self._longest, now - self._written), now
            self._report.write(state, update=update, note=note, expected=self._longest)

    def _count(self, record: Record) -> None:
        self._update = record.update

    def _speed(self, record: Record) -> dict[str, str]:
        return {"images/s": f"{record.samples / max(self.pace.per_update, 1e-9):.3g}"}
