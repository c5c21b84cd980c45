"""The hooks of the last update that are still to be called: part of a checkpoint.

A checkpoint is written among the hooks of an update, or instead of them when a signal stops the run. A validation or a
preview that was due then runs when the run continues, exactly once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mflux_vae_train.checkpointing.state import Stateful
from mflux_vae_train.training.hooks import Record


class PendingHooks:
    """Updated by `loop.fit`.

    Attributes:
        count: how many are pending, counted from the last hook.
        record: the argument for them.
        saved_update: update of the last checkpoint that was written or read.
    """

    def __init__(self) -> None:
        self.count = 0
        self.record: Record | None = None
        self.saved_update: int | None = None

    def stateful(self) -> Stateful:
        """For a checkpoint, as one JSON text: the names of a record's metrics are not known in advance."""
        return Stateful(read=self._read, write=self._write)

    def _read(self) -> dict[str, str]:
        self._note_saved()
        # without the duration, so that equal runs have equal checkpoints
        record = None if self.record is None else {**dataclasses.asdict(self.record), "seconds": 0.0}
        return {"pending_hooks": json.dumps({"hooks": self.count, "record": record})}

    def _write(self, tree: Any) -> None:
        content = json.loads(tree["pending_hooks"])
        self.count = content["hooks"]
        self.record = None if content["record"] is None else Record(**content["record"])
        self._note_saved()

    def _note_saved(self) -> None:
        self.saved_update = None if self.record is None else self.record.update


def last_rate(values: Mapping[str, Any]) -> float | None:
    """Learning rate of the update before a checkpoint, from its plain values; None if it is not there."""
    try:
        record = json.loads(values["pending_hooks/pending_hooks"])["record"]
        return float(record["metrics"]["learning_rate"])
    except (KeyError, TypeError, ValueError):
        return None
