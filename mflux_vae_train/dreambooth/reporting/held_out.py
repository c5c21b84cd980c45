"""The held-out loss during a run, and the adapter that it is lowest for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.best_adapter import MEASURED, Best, read_best
from mflux_vae_train.dreambooth.export import save_adapter_files
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.dreambooth.run_folder import ADAPTER, RunFolder
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.hooks import read_metrics

logger = logging.getLogger(__name__)

METRIC = "held_out_loss"
"""Name in the metrics log."""


class HeldOut:
    """Called with the number of updates made: measures the held-out loss, logs it, and keeps the adapter if it is best.

    An adapter that an interrupted run kept stays the best one until the run has made its update again.

    Args:
        measure: see `held_out_loss.HeldOutLoss`; called by all processes.
        start: updates made before.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        measure: Callable[[], float],
        run: Preparation,
        folder: RunFolder,
        *,
        start: int,
        processes: ProcessGroup = SINGLE,
    ) -> None:
        self._pipeline, self._measure, self._run, self._folder = pipeline, measure, run, folder
        self._start, self._processes = start, processes
        self._best: Best | None = None
        self._looked = False
        records = measured_records(read_metrics(folder.metrics) if start else [])
        comparable = not records or records[-1].get(MEASURED) == run.measured
        self._untrained = next((one[METRIC] for one in records if comparable and one["update"] == 0), None)
        if not comparable:
            logger.warning("earlier held-out losses are of other images or other noise: they do not count any more")

    def __call__(self, update: int) -> dict[str, Any]:
        """The loss, and what was measured, for the metrics log."""
        loss = self._measure()
        better = self._run.resolved.keep_best and update > 0 and self._is_best(loss)
        if better:
            self._best = Best(update=update, loss=loss, measured=self._run.measured)
            if self._processes.is_main:
                save_adapter_files(self._pipeline, self._run.resolved, self._folder.best, self._best.metadata)
        if update == 0:
            self._untrained = loss
        kept = f", the lowest {self._since(loss)}: kept in {self._folder.best}" if better else ""
        logger.info("held-out loss after update %d: %.4f%s", update, loss, kept)
        if not math.isfinite(loss):
            logger.warning("the held-out loss is not finite: look for a broken held-out image")
        return {METRIC: loss, MEASURED: self._run.measured}

    def _since(self, loss: float) -> str:
        if self._untrained is None or not loss >= self._untrained:
            return "so far"
        return f"of the training (untrained: {self._untrained:.4f})"

    def _is_best(self, loss: float) -> bool:
        if not self._looked:  # now, as the start of the run may have moved it
            found = self._processes.broadcast(self._find)
            self._best, self._looked = None if found is None else Best(**found), True
        return math.isfinite(loss) and (self._best is None or loss < self._best.loss)

    def _find(self) -> dict[str, Any] | None:
        """The best adapter of an earlier part of this run."""
        path = self._folder.best / ADAPTER
        best, status = read_best(path), self._run.status
        if best is None or (best.update > self._start and status.changed):
            return None
        if best.measured != self._run.measured:
            logger.warning("%s is replaced: its loss is of other held-out images or other noise", path)
            return None
        return asdict(best)


@dataclass(frozen=True, kw_only=True)
class HeldOutLosses:
    """
    Attributes:
        untrained: the loss before the first update; None if it was not measured.
        trained: finite losses by update, of one or more updates.
    """

    untrained: float | None
    trained: Mapping[int, float]

    @property
    def best(self) -> tuple[int, float]:
        """Update and loss of the lowest one."""
        return min(self.trained.items(), key=lambda one: one[1])

    @property
    def improved(self) -> bool:
        """Whether the lowest one is below the untrained one, as far as this is known."""
        return self.untrained is None or not self.best[1] >= self.untrained  # also if it is NaN

    @property
    def text(self) -> str:
        update, lowest = self.best
        first = "" if self.untrained is None else f"{self.untrained:.4f} untrained, "
        when = "at its lowest" if self.improved else "at the lowest of the training"
        return f"{first}{lowest:.4f} {when}, after update {update}, {[*self.trained.values()][-1]:.4f} at the end"

    @property
    def warning(self) -> str | None:
        """What to do if no measurement is below the untrained one."""
        if self.improved:
            return None
        return (
            f"no held-out loss was below that of the untrained model ({self.untrained:.4f}; lowest {self.best[1]:.4f})."
            " With few held-out images this may be noise: compare pictures with mflux-dreambooth draw or evaluate. If"
            " they are no better than untrained ones, try a lower --learning_rate"
        )


def measured_records(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Lines of a metrics log with a held-out loss, of the same images and noise as the last one."""
    found = [record for record in records if METRIC in record]
    return [record for record in found if record.get(MEASURED) == found[-1].get(MEASURED)]


def held_out_losses(records: Sequence[Mapping[str, Any]]) -> HeldOutLosses | None:
    """The held-out losses in the lines of a metrics log; None if there is none of an update."""
    losses = {record["update"]: record[METRIC] for record in measured_records(records)}
    trained = {update: loss for update, loss in losses.items() if update and math.isfinite(loss)}
    return HeldOutLosses(untrained=losses.get(0), trained=trained) if trained else None
