"""What a run asks of a pipeline, and what that takes of a machine: said before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run is going to ask of a pipeline, as far as it takes memory or time.

    Attributes:
        resolution: side of the pictures that are drawn, in pixels.
        shape: height and width of the largest that is trained on; None for a square of that side.
        prompts: how many are encoded, `prompts_at_once` of them together, of at most `prompt_tokens` each (None: as
            many as the model reads).
        batch: samples in a forward and backward pass, those of the prior included.
        micro_batches: such passes in an update, so many of them `side_by_side`.
        class_pictures: to be drawn before the training.
        pictures: drawn at once, in previews and class pictures, with this `guidance` and so many `steps`.
        trained: weights that are trained.
        adapter: whether they are an adapter's, beside those of the denoiser.
        text_encoder: whether some of them are the text encoder's, which then is there throughout.
        state_bytes: what the optimizer keeps for each of them.
        quantize: bits of the frozen weights; None for the pipeline's precision.
        recompute: whether activations are computed again (`Recomputes`).
    """

    resolution: int
    trained: int
    shape: tuple[int, int] | None = None
    adapter: bool = True
    state_bytes: float = 8
    batch: int = 1
    micro_batches: int = 1
    side_by_side: int = 1
    prompts: int = 4
    prompts_at_once: int = 16
    prompt_tokens: int | None = None
    class_pictures: int = 0
    pictures: int = 1
    guidance: float = 1.0
    steps: int = 4
    quantize: int | None = None
    recompute: bool = False
    text_encoder: bool = False

    @property
    def trained_shape(self) -> tuple[int, int]:
        """Height and width of the largest picture that is trained on."""
        return self.shape or (self.resolution, self.resolution)


@dataclass(frozen=True)
class Phase:
    """A part of a run, at its peak.

    Attributes:
        name: such as "training".
        weights: bytes of what is held throughout.
        work: bytes that come and go.
        operations: multiplications and additions; those of one update where it is training. 0 where nobody counted.
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
