"""The adapter with the lowest held-out loss so far, in the folder ``best``: its file states the update and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.files import header

UPDATE, LOSS, MEASURED = "update", "held_out_loss", "held_out_images"
"""Names in the metadata of the file."""


@dataclass(frozen=True, kw_only=True)
class Best:
    """
    Attributes:
        update: the update that it is the adapter of.
        loss: its held-out loss.
        measured: identifies the images and the noise of the measurement; losses of others cannot be compared.
    """

    update: int
    loss: float
    measured: str

    @property
    def metadata(self) -> dict[str, str]:
        return {UPDATE: str(self.update), LOSS: repr(self.loss), MEASURED: self.measured}


def read_best(path: Path) -> Best | None:
    """What the file states; None if there is none, or it is not whole."""
    try:
        _, metadata = header(path)
        return Best(update=int(metadata[UPDATE]), loss=float(metadata[LOSS]), measured=metadata[MEASURED])
    except (WeightsError, KeyError, ValueError):
        return None
