"""What a run asks of a pipeline, and what that takes of a machine: said before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run is going to ask of a pipeline, as far as it takes memory.

    Attributes:
        resolution: side of the pictures in pixels.
        prompts: how many are encoded.
        batch: samples in a forward and backward pass, those of the prior included.
        pictures: drawn at once, for previews and class pictures.
        guidance: of these.
        draws_class_pictures: whether some are to be drawn before the training.
        rank: of the adapter, on the layers that match `targets`; None where all weights are trained.
        state_bytes: what the optimizer keeps for each trained weight.
        quantize: bits of the frozen weights; None for the pipeline's precision.
        recompute: whether activations are computed again (`Recomputes`).
    """

    resolution: int
    prompts: int = 4
    batch: int = 1
    pictures: int = 1
    guidance: float = 1.0
    draws_class_pictures: bool = False
    rank: int | None = None
    targets: Sequence[str] = ()
    state_bytes: int = 8
    quantize: int | None = None
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run, at its peak.

    Attributes:
        name: such as "training".
        weights: bytes of what is held throughout.
        work: bytes that come and go.
        operations: multiply-adds times two, of all of it; of one update where it is training.
    """

    name: str
    weights: int
    work: int
    operations: float

    @property
    def peak(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a run takes.

    Attributes:
        phases: in their order.
        download: bytes that are not on this machine yet, and `cache`, the folder that they go to.
    """

    phases: Sequence[Phase]
    download: int = 0
    cache: Path | None = None

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)
