"""Which adapters are evaluated at which scales."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.weights.formats.files import read_json
from mflux_vae_train.dreambooth.best_adapter import read_best
from mflux_vae_train.dreambooth.drawing.source import BEST, LAST, Source
from mflux_vae_train.dreambooth.run_folder import RunFolder

UNTRAINED = "untrained"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is evaluated.

    Attributes:
        name: of the checkpoint.
        update: number of updates after which it was saved.
        label: of its adapter in `Source.adapters`; None for the untrained model, and for a model whose weights were all
            trained.
    """

    name: str
    update: int
    scale: float
    label: str | None = None

    @property
    def is_base(self) -> bool:
        return self.scale == 0


def plan(source: Source, checkpoints: Sequence[str] | None, scales: Sequence[float], updates: int) -> list[Entry]:
    """The untrained model, then each adapter at each scale, in the order of updates.

    Args:
        checkpoints: names as for `Source.label`; None for all.
        updates: of the whole run.

    Raises:
        SettingsError: there is no such checkpoint, or no scale but 0.
    """
    base = Entry(name=UNTRAINED, update=0, scale=0.0)
    scales = sorted({scale for scale in scales if scale != 0})
    if not scales:
        raise SettingsError("--scale: 0 is the untrained model, which is always evaluated; give others, such as 1")
    if not source.adapters:
        if checkpoints is not None or scales != [1]:
            raise SettingsError(f"{source.path} trained all weights: there are no other checkpoints and scales")
        return [base, Entry(name=LAST, update=updates, scale=1.0)]
    labels = [*source.adapters] if checkpoints is None else [source.label(name) for name in checkpoints]
    numbers = {label: _update(source, label, updates) for label in labels}
    # of several labels for one update, the number
    found = {number: label for label, number in sorted(numbers.items(), key=lambda item: item[0].isdecimal())}
    return [
        base,
        *(
            Entry(name=label, update=number, scale=scale, label=label)
            for number, label in sorted(found.items())
            for scale in scales
        ),
    ]


def base_identity(source: Source) -> dict[str, Any]:
    """What identifies the model of a run without its adapters: plain values."""
    opening = ("model", "revision", "variant", "vae", "prediction_type", "quantize", "max_sequence_length", "clip_skip")
    values = {name: getattr(source, name) for name in opening}
    identity = read_json(RunFolder(source.root).identity)["identity"] if source.root is not None else {}
    if not source.adapters:
        run = json.dumps(identity, sort_keys=True)
        del values["model"]  # a path in the run's folder, which may move
        return {**values, "run": hashlib.sha256(run.encode()).hexdigest()}
    return {**values, **{name: identity.get(name) for name in ("base weights", "encoders")}}


def _update(source: Source, label: str, updates: int) -> int:
    """The update after which an adapter was saved. Without a result, `LAST` is the newest checkpoint."""
    if label.isdecimal():
        return int(label)
    if label == BEST and (best := read_best(source.file(label))) is not None:
        return best.update
    same = [name for name, file in source.adapters.items() if name.isdecimal() and file == source.adapters[label]]
    return int(same[0]) if same else updates
