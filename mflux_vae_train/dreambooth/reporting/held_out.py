"""The held-out loss during a run, and the adapter that it is lowest for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.best_adapter import Best, read_best
from mflux_vae_train.dreambooth.export import save_adapter_files
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.dreambooth.run_folder import ADAPTER, RunFolder
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

logger = logging.getLogger(__name__)

METRIC = "held_out_loss"
"""Name in the metrics log."""


class HeldOut:
    """Called with the number of updates made: returns the held-out loss, logs it, and keeps the adapter if it is best.

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

    def __call__(self, update: int) -> float:
        loss = self._measure()
        better = self._run.resolved.keep_best and update > 0 and self._is_best(loss)
        if better:
            self._best = Best(update=update, loss=loss, measured=self._run.measured)
            if self._processes.is_main:
                save_adapter_files(self._pipeline, self._run.resolved, self._folder.best, self._best.metadata)
        kept = f", the lowest so far: kept in {self._folder.best}" if better else ""
        logger.info("held-out loss after update %d: %.4f%s", update, loss, kept)
        if not math.isfinite(loss):
            logger.warning("the held-out loss is not finite: look for a broken held-out image")
        return loss

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


def held_out_text(records: Sequence[Mapping[str, Any]]) -> str | None:
    """First, lowest and last held-out loss of a run; None if there is none.

    Args:
        records: lines of the metrics log.
    """
    measured = [(record["update"], record[METRIC]) for record in records if METRIC in record]
    trained = [one for one in measured if one[0] > 0 and math.isfinite(one[1])]
    if not trained:
        return None
    update, lowest = min(trained, key=lambda one: one[1])
    first = f"{measured[0][1]:.4f} untrained, " if measured[0][0] == 0 else ""
    return f"{first}{lowest:.4f} at its lowest, after update {update}, {trained[-1][1]:.4f} at the end"
