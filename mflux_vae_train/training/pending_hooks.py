"""The hooks of the last update that are still to be called: part of a checkpoint.

A checkpoint is written among the hooks of an update, or in their place when a signal ends the run. A validation or a
preview that was due then is made up for when the run goes on, neither left out nor made twice.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mflux_vae_train.checkpointing.state import Stateful
from mflux_vae_train.training.hooks import Record


class PendingHooks:
    """Kept by `loop.fit`.

    Attributes:
        hooks: how many, counted from the last one.
        record: what they are to be called with.
        kept: number of updates in the last checkpoint that was written or read; None for none.
    """

    def __init__(self) -> None:
        self.hooks = 0
        self.record: Record | None = None
        self.kept: int | None = None

    def stateful(self) -> Stateful:
        """For a checkpoint; one text, as the metrics of a record have any names."""
        return Stateful(read=self._read, write=self._write)

    def _read(self) -> dict[str, str]:
        self._keep()
        # without the time that it took, so that equal runs have equal checkpoints
        record = None if self.record is None else {**dataclasses.asdict(self.record), "seconds": 0.0}
        return {"pending_hooks": json.dumps({"hooks": self.hooks, "record": record})}

    def _write(self, tree: Any) -> None:
        told = json.loads(tree["pending_hooks"])
        self.hooks = told["hooks"]
        self.record = None if told["record"] is None else Record(**told["record"])
        self._keep()

    def _keep(self) -> None:
        self.kept = None if self.record is None else self.record.update
